"""The definitions against the reference vectors, each other, and numerical differentiation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CASES, Case, run

from openxlstm.ops import mlstm, mlstm_initial_state, mlstm_step
from openxlstm.state import mLSTMState

GOLDEN = [
    "mlstm_recurrent_s13",
    "mlstm_recurrent_init_s7",
    "mlstm_chunkwise_s64_c16",
    "mlstm_chunkwise_init_s48_c16",
    "mlstm_chunkwise_custbw_s32_c16",
    "mlstm_parallel_s29",
    "mlstm_backend_inference_s37_c32",
    "mlstm_backend_padded_s37_c16",
    "mlstm_recurrent_extreme_s20",
    "mlstm_siging_parallel_s21",
]


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("name", GOLDEN)
def test_reference_vectors(name, precision, backend, golden, rel_error):
    meta, tensors = golden(name)
    dtype = torch.float32 if precision == "f32" else torch.float64
    value_tolerance, grad_tolerance = (3e-4, 3e-3) if precision == "f32" else (2e-6, 2e-6)
    x = {
        name.removeprefix("in."): t.to(dtype).requires_grad_()
        for name, t in tensors.items()
        if name.startswith("in.")
    }
    head_first = partial(torch.transpose, dim0=1, dim1=2)
    state = None
    if "c_initial" in x:
        state = mLSTMState(x["c_initial"], x["n_initial"], x["m_initial"].squeeze(-1))
    h, last = mlstm(
        *(head_first(x[name]) for name in "qkvif"),
        state=state,
        return_state=True,
        input_gate="sigmoid" if "siging" in name else "exp",
        eps=meta["eps"],
        chunk_size=meta.get("chunk_size", 16),
        backend=backend,
    )
    assert rel_error(head_first(h), tensors[f"{precision}.h"]) < value_tolerance
    for actual, key in zip((last.c, last.n, last.m[..., None]), ("c_last", "n_last", "m_last"), strict=True):
        if f"{precision}.{key}" in tensors:
            assert rel_error(actual, tensors[f"{precision}.{key}"]) < value_tolerance
    gradients = {name: t for name, t in tensors.items() if name.startswith(f"{precision}.grad.")}
    if "custbw" in name or not gradients:  # that vector's gradients leave out the normaliser
        return
    (head_first(h) * x["loss_weight"].detach()).sum().backward()
    for key, expected in gradients.items():
        assert rel_error(x[key.split(".")[-1]].grad, expected) < grad_tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_parallel_is_recurrent(name, rel_error):
    case = CASES[name]
    inputs = case.inputs()
    for losses in ("h", "hcnm"):
        expected, expected_grad = run(case, inputs, "recurrent", losses=losses)
        actual, actual_grad = run(case, inputs, "parallel", losses=losses)
        for key in expected:
            assert rel_error(actual[key], expected[key]) < 1e-10, key
        for key, grad in expected_grad.items():
            torch.testing.assert_close(actual_grad[key], grad, rtol=1e-9, atol=1e-11)


GRADCHECK = {
    "exp": Case(batch=1, time=6, qk_dim=3, v_dim=2, with_state=True),
    "reset": Case(batch=1, time=6, qk_dim=2, v_dim=3, with_state=True, reset_every=3),
    "sigmoid": Case(batch=1, time=5, qk_dim=2, v_dim=2, with_state=True, input_gate="sigmoid"),
    "eps": Case(batch=1, time=5, qk_dim=2, v_dim=2, with_state=True, eps=0.3),
}


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name in GRADCHECK
        for which in ((0,), (1,), (2,), (3,), (0, 1, 2, 3))
        if (name, which) != ("sigmoid", (3,))  # the sigmoid gate's m is constant
    ],
)
def test_gradcheck(name, backend, which):
    case = GRADCHECK[name]
    x = [t.requires_grad_() for t in case.inputs().values()]

    def function(q, k, v, i, f, c, n, m):
        h, last = mlstm(
            q,
            k,
            v,
            i,
            f,
            state=mLSTMState(c, n, m),
            return_state=True,
            reset=case.reset(),
            chunk_size=2,
            backend=backend,
            **case.options(),
        )
        return tuple((h, *last)[w] for w in which)

    assert torch.autograd.gradcheck(function, x, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["recurrent", "parallel"])
def test_second_derivatives(backend):
    case = Case(batch=1, time=3, heads=1, qk_dim=2, v_dim=2, with_state=True)
    x = [t.requires_grad_() for t in case.inputs().values()]

    def function(q, k, v, i, f, c, n, m):
        h, last = mlstm(q, k, v, i, f, state=mLSTMState(c, n, m), return_state=True, backend=backend)
        return h, last.c, last.n

    assert torch.autograd.gradgradcheck(function, x, atol=1e-5)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_steps_are_the_sequence(input_gate, rel_error):
    case = Case(input_gate=input_gate, time=9, with_state=True, forget_all_at=(4,))
    x = case.inputs()
    state = mLSTMState(x["c0"], x["n0"], x["m0"])
    expected, last = mlstm(*(x[n] for n in "qkvif"), state=state, return_state=True, input_gate=input_gate)
    for t in range(case.time):
        h, state = mlstm_step(*(x[n][:, t] for n in "qkvif"), state, input_gate=input_gate)
        assert rel_error(h, expected[:, t]) < 1e-10
    for actual, wanted in zip(state, last, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_step_keeps_gates_in_float32():
    """A bfloat16 model must still be able to forget slowly: 0.999 is 1.0 in bfloat16."""
    state = mlstm_initial_state(1, 1, 4, 4)
    state = state._replace(c=torch.ones_like(state.c), n=torch.ones_like(state.n))
    zero = torch.zeros(1, 1, 4, dtype=torch.bfloat16)
    forget = torch.full((1, 1), 7.0)  # sigmoid 0.99909
    _, after = mlstm_step(zero, zero, zero, torch.full((1, 1), -20.0), forget, state, input_gate="sigmoid")
    torch.testing.assert_close(after.c, torch.sigmoid(forget)[..., None, None].expand_as(after.c))
