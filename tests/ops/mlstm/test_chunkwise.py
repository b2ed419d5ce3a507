"""The chunkwise backends against the float64 definition, and the properties every backend must have."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, run
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.ops import mlstm
from openxlstm.ops.mlstm import workspace
from openxlstm.ops.native import loader
from openxlstm.state import mLSTMState


@pytest.fixture(params=["chunkwise", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that cuts time into chunks, where it can run."""
    if request.param == "native" and loader.unavailable() is not None:
        pytest.skip(str(loader.unavailable()))
    return request.param


@pytest.mark.parametrize("losses", ["h", "cnm", "c", "n", "m", "hcnm"])
@pytest.mark.parametrize("name", CASES)
def test_float64_values_and_gradients(name, losses, rel_error):
    case = CASES[name]
    inputs = case.inputs()
    expected, expected_grad = run(case, inputs, "recurrent", losses=losses)
    for chunk_size in (1, 5, 16, 64):
        actual, actual_grad = run(case, inputs, "chunkwise", chunk_size=chunk_size, losses=losses)
        for key in expected:
            assert rel_error(actual[key], expected[key]) < 1e-10, (key, chunk_size)
        for key, grad in expected_grad.items():
            torch.testing.assert_close(
                actual_grad[key], grad, rtol=1e-9, atol=1e-11, msg=f"d{key}, L={chunk_size}"
            )


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].gate_std <= 1 and CASES[n].qk_dim > 1])
def test_float32(name, backend, rel_error):
    """Against the definition in float64 on the same float32 inputs."""
    case = CASES[name].but(time=100, heads=3, qk_dim=32, v_dim=24, forget_mean=1.0)
    inputs = case.inputs(torch.float32)
    exact = {key: t.double() for key, t in inputs.items()}
    expected, expected_grad = run(case, exact, "recurrent", losses="hcnm")
    actual, actual_grad = run(case, inputs, backend, chunk_size=32, losses="hcnm")
    for key in expected:
        assert actual[key].dtype == torch.float32
        assert rel_error(actual[key], expected[key]) < 5e-6, key
    for key, grad in expected_grad.items():
        assert rel_error(actual_grad[key], grad) < 2e-5, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bfloat16_units", [False, True])
def test_half_precision_beats_the_plain_formula(dtype, bfloat16_units, backend, rel_error, monkeypatch):
    """Never worse than the plain definition evaluated in that precision, and close on the whole."""
    monkeypatch.setattr(workspace, "has_fast_bfloat16", lambda _: bfloat16_units)
    case = Case(time=48, qk_dim=16, v_dim=16, forget_mean=3.0)
    inputs = case.inputs(dtype)
    exact = {key: t.double() for key, t in inputs.items()}
    expected, expected_grad = run(case, exact, "recurrent")
    actual, actual_grad = run(case, inputs, backend, chunk_size=16)
    assert actual["h"].dtype == dtype
    assert actual["c"].dtype == torch.float32
    plain = plain_formula(*(inputs[n] for n in "qkvif"))
    assert rel_error(actual["h"], expected["h"]) <= rel_error(plain, expected["h"])
    tolerance = (2e-2 if bfloat16_units else 6e-3) if dtype == torch.bfloat16 else 2e-3
    assert rel_error(actual["h"], expected["h"]) < tolerance
    for key, grad in expected_grad.items():
        assert rel_error(actual_grad[key], grad) < 4 * tolerance, key


def plain_formula(q, k, v, i, f):
    """The quadratic form; products in the dtype of q, k, v, gates in that of i, f."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    log_f = torch.nn.functional.logsigmoid(f.transpose(1, 2)).cumsum(-1)
    decay = log_f[..., :, None] - log_f[..., None, :] + i.transpose(1, 2)[..., None, :]
    decay = decay.masked_fill(~torch.ones(decay.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    m = torch.maximum(decay.amax(-1), log_f)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 * (decay - m[..., None]).exp()
    den = torch.maximum(scores.sum(-1).abs(), (-m).exp())
    return (scores.to(v.dtype) @ v / den[..., None]).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(
    time=st.integers(1, 40),
    split=st.integers(0, 40),
    chunk_size=st.integers(1, 41),
    reset_every=st.sampled_from([0, 4, 9]),
    input_gate=st.sampled_from(["exp", "sigmoid"]),
    seed=st.integers(0, 10**6),
)
def test_any_split_gives_the_same(time, split, chunk_size, reset_every, input_gate, seed):
    """Values, states and gradients do not depend on where a sequence is cut in two or on the chunk size."""
    split = min(split, time)
    case = Case(
        time=time,
        with_state=True,
        reset_every=reset_every,
        input_gate=input_gate,
        seed=seed,
        qk_dim=4,
        v_dim=3,
    )
    inputs = case.inputs()
    whole, whole_grad = run(case, inputs, "recurrent")
    x = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    state, pieces = mLSTMState(x["c0"], x["n0"], x["m0"]), []
    reset = case.reset()
    for part in (slice(0, split), slice(split, time)):
        h, state = mlstm(
            *(x[n][:, part] for n in "qkvif"),
            state=state,
            return_state=True,
            reset=None if reset is None else reset[:, part],
            chunk_size=chunk_size,
            backend="chunkwise",
            **case.options(),
        )
        pieces.append(h)
    outputs = {"h": torch.cat(pieces, 1), "c": state.c, "n": state.n, "m": state.m}
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (outputs[k] * torch.randn(y.shape, generator=g, dtype=torch.float64)).sum() for k, y in whole.items()
    )
    grads = torch.autograd.grad(loss, list(x.values()))
    for key, y in whole.items():
        torch.testing.assert_close(outputs[key], y, rtol=1e-9, atol=1e-9)
    for (key, grad), actual in zip(whole_grad.items(), grads, strict=True):
        scale = float(grad.abs().max()) + 1e-3
        torch.testing.assert_close(
            actual, grad, rtol=1e-8, atol=1e-8 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
def test_empty_sequence(backend):
    case = Case(time=0, with_state=True)
    x = {name: t.requires_grad_() for name, t in case.inputs().items()}
    state = mLSTMState(x["c0"], x["n0"], x["m0"])
    h, last = mlstm(*(x[n] for n in "qkvif"), state=state, return_state=True, backend=backend)
    assert h.shape == (2, 0, 2, 12)
    assert all(torch.equal(a, b) for a, b in zip(last, state, strict=True))
    (last.c.sum() + 2 * last.n.sum() + 3 * last.m.sum()).backward()
    assert torch.equal(x["m0"].grad, torch.full_like(x["m0"], 3.0))
    assert torch.equal(x["c0"].grad, torch.ones_like(x["c0"]))


def test_empty_batch():
    x = [t.requires_grad_() for t in Case(batch=0, time=5).inputs(torch.float32).values()]
    h = mlstm(*x, chunk_size=2)
    assert h.shape == (0, 5, 2, 12)
    h.sum().backward()
    assert x[0].grad.shape == (0, 5, 2, 8)


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_packed_documents_are_separate_sequences(backend, input_gate, rel_error):
    lengths = [5, 0, 1, 18, 2, 11]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    case = Case(batch=1, time=int(offsets[-1]), input_gate=input_gate)
    x = case.inputs()
    states = Case(batch=len(lengths), time=1, with_state=True, input_gate=input_gate, seed=3).inputs()
    given = mLSTMState(states["c0"], states["n0"], states["m0"])
    for state in (None, given):
        packed = {n: x[n].clone().requires_grad_() for n in "qkvif"}
        h, last = mlstm(
            *packed.values(),
            state=state,
            return_state=True,
            cu_seqlens=offsets,
            input_gate=input_gate,
            chunk_size=4,
            backend=backend,
        )
        only_h = mlstm(
            *packed.values(),
            state=state,
            cu_seqlens=offsets,
            input_gate=input_gate,
            chunk_size=4,
            backend=backend,
        )
        torch.testing.assert_close(only_h, h, rtol=1e-11, atol=1e-12)
        for n, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            alone = {name: x[name][:, a:b].clone().requires_grad_() for name in "qkvif"}
            one = None if state is None else mLSTMState(*(s[n : n + 1] for s in state))
            h_alone, last_alone = mlstm(
                *alone.values(), state=one, return_state=True, input_gate=input_gate, backend="recurrent"
            )
            torch.testing.assert_close(h[:, a:b], h_alone, rtol=1e-10, atol=1e-12)
            for packed_leaf, alone_leaf in zip(last, last_alone, strict=True):
                torch.testing.assert_close(packed_leaf[n : n + 1], alone_leaf, rtol=1e-10, atol=1e-12)
            if a == b:
                continue
            grads = torch.autograd.grad(
                only_h[:, a:b].square().sum(), list(packed.values()), retain_graph=True
            )
            expected = torch.autograd.grad(h_alone.square().sum(), list(alone.values()))
            for grad, wanted in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad[:, a:b], wanted, rtol=1e-9, atol=1e-11)
                assert not grad[:, :a].any(), "exactly zero before the document"
                assert not grad[:, b:].any(), "exactly zero after the document"


@pytest.mark.parametrize("kind", ["reset", "forget"])
def test_nothing_crosses_a_boundary(kind, backend):
    """Bit for bit: neither values, nor states, nor gradients, whatever stands on the other side."""
    case = Case(batch=1, time=40, with_state=True)
    x = case.inputs(torch.float32)
    reset = None
    if kind == "reset":
        reset = torch.zeros(1, 40, dtype=torch.bool)
        reset[0, 17] = True
    else:
        x["f"][:, 17] = -torch.inf
    y = {n: t.clone() for n, t in x.items()}
    for name in "qkvif":
        y[name][:, :17] = torch.randn_like(y[name][:, :17]) * 3
    y["c0"] = y["c0"] * 100
    results = []
    for inputs in (x, y):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        h, last = mlstm(
            *(leaves[n] for n in "qkvif"),
            state=mLSTMState(leaves["c0"], leaves["n0"], leaves["m0"]),
            return_state=True,
            reset=reset,
            chunk_size=16,
            backend=backend,
        )
        loss = h[:, 17:].square().sum() + sum(s.square().sum() for s in last)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name in "qkvif":
            assert not grads[name][:, :17].any(), name
        assert not any(grads[n].any() for n in ("c0", "n0", "m0"))
        results.append([h[:, 17:], *last, *(grads[n][:, 17:] for n in "qkvif")])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_causal_and_row_independent(backend):
    case = Case(batch=3, time=50, qk_dim=16)
    x = case.inputs(torch.float32)
    h = mlstm(*(x[n] for n in "qkvif"), chunk_size=16, backend=backend)
    y = {n: t.clone() for n, t in x.items()}
    for name in "qkvif":
        y[name][1, 20:] += 1.0
        y[name][2] *= -2.0
    other = mlstm(*(y[n] for n in "qkvif"), chunk_size=16, backend=backend)
    assert torch.equal(other[0], h[0])
    assert torch.equal(other[1, :20], h[1, :20])


@pytest.mark.parametrize("layout", ["head_first", "sliced", "expanded"])
def test_strides(layout, backend):
    x = Case(time=33).inputs(torch.float32)
    expected = mlstm(*(x[n] for n in "qkvif"), chunk_size=8, backend=backend)
    if layout == "head_first":
        x = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    elif layout == "sliced":
        x = {n: torch.stack([t, -t], -1)[..., 0] for n, t in x.items()}
    else:
        x["k"] = x["k"][:, :, :1].expand(-1, -1, 2, -1)
        expected = mlstm(*(x[n].contiguous() for n in "qkvif"), chunk_size=8, backend=backend)
    leaves = [x[n].detach().requires_grad_() for n in "qkvif"]
    h = mlstm(*leaves, chunk_size=8, backend=backend)
    torch.testing.assert_close(h, expected)
    h.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves)


EXTREMES = [-torch.inf, -1e3, -100.0, -20.0, 0.0, 20.0, 100.0, 1e3]


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates(input_gate, dtype, backend):
    """All mixtures of extreme gates: finite, and equal to the definition in float64."""
    if dtype == torch.float64 and backend == "native":
        pytest.skip("the native backend computes in float32")
    g = torch.Generator().manual_seed(5)
    case = Case(batch=8, time=24, input_gate=input_gate)
    x = case.inputs(dtype)
    choices = torch.tensor(EXTREMES, dtype=dtype)
    for name in "if":
        x[name] = choices[torch.randint(len(EXTREMES), x[name].shape, generator=g)]
    expected, _ = run(case, {n: t.double() for n, t in x.items()}, "recurrent")
    actual, grads = run(case, x, backend, chunk_size=7, losses="h")
    well = torch.isfinite(expected["h"]).all(-1)
    assert well.all()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    scale = expected["h"].abs().amax(-1, keepdim=True).clamp_min(1.0)
    assert ((actual["h"] - expected["h"]).abs() / scale).max() < tolerance
    assert all(torch.isfinite(t).all() for t in grads.values())


def test_closed_input_gates_give_zero(backend):
    x = Case(time=20).inputs(torch.float32)
    x["i"] = torch.full_like(x["i"], -torch.inf)
    assert not mlstm(*(x[n] for n in "qkvif"), chunk_size=6, backend=backend).any()


def test_equivalent_stabilisers(rel_error):
    """m only scales: (C e^-d, n e^-d, m + d) is the same memory, exactly so for eps = 0."""
    x = Case(with_state=True).inputs()
    shift = 3.0
    a = mLSTMState(x["c0"], x["n0"], x["m0"])
    scale = torch.exp(torch.tensor(-shift, dtype=torch.float64))
    b = mLSTMState(a.c * scale, a.n * scale, a.m + shift)
    h = [mlstm(*(x[n] for n in "qkvif"), state=s, eps=0.0) for s in (a, b)]
    assert rel_error(h[0], h[1]) < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads, backend):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(time=200, qk_dim=32, v_dim=32, with_state=True)
        inputs = case.inputs(torch.float32)
        first = run(case, inputs, backend)
        for _ in range(2):
            again = run(case, inputs, backend)
            for a, b in zip(first, again, strict=True):
                assert all(torch.equal(a[k], b[k]) for k in a)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("forget", [20.0, 4.0])
def test_64k_steps(forget, backend, rel_error):
    """No overflow and no drift over 65,536 tokens; error against float64 does not grow with length."""
    case = Case(batch=1, time=65536, heads=1, qk_dim=8, v_dim=8, gate_std=0.5, forget_mean=forget)
    inputs = case.inputs(torch.float32)
    exact = {n: t.double() for n, t in inputs.items()}
    _, expected = mlstm(*(exact[n] for n in "qkvif"), return_state=True, chunk_size=256)
    _, last = mlstm(*(inputs[n] for n in "qkvif"), return_state=True, backend=backend)
    for a, b in zip(last, expected, strict=True):
        assert rel_error(a, b) < 1e-5


def test_gradient_error_does_not_grow_with_length(backend, rel_error):
    errors = []
    for time in (1024, 16384):
        case = Case(batch=1, time=time, heads=1, qk_dim=16, v_dim=16, forget_mean=4.0)
        inputs = case.inputs(torch.float32)
        exact = {n: t.double() for n, t in inputs.items()}
        _, expected = run(case, exact, "chunkwise", losses="h")
        _, actual = run(case, inputs, backend, losses="h")
        errors.append(max(rel_error(actual[n], expected[n]) for n in "qkvif"))
    assert errors[1] < 2 * errors[0]


@pytest.fixture
def operator(backend):
    """The custom operator behind a backend."""
    return getattr(torch.ops.openxlstm, f"mlstm_{backend}").default


@pytest.mark.parametrize("case", [Case(with_state=True), Case(with_state=True, reset_every=5)])
def test_opcheck(case, operator):
    x = [t.requires_grad_() for t in case.inputs(torch.float32).values()]
    torch.library.opcheck(operator, (*x, case.reset(), False, True, 1e-6, 16))


def test_opcheck_strided_state(operator):
    x = list(Case(with_state=True).inputs(torch.float32).values())
    x[5] = x[5].transpose(2, 3).contiguous().transpose(2, 3)
    x[6] = x[6].transpose(0, 1).contiguous().transpose(0, 1)
    x = [t.requires_grad_() for t in x]
    torch.library.opcheck(operator, (*x, None, False, True, 1e-6, 16))


def test_compiles_without_graph_breaks(backend):
    case = Case(time=20, with_state=True, reset_every=6)
    x = [t.requires_grad_() for t in case.inputs(torch.float32).values()]

    def function(q, k, v, i, f, c, n, m, reset):
        state = mLSTMState(c, n, m)
        h, last = mlstm(q, k, v, i, f, state=state, reset=reset, return_state=True, backend=backend)
        return h * 2, last

    expected, _ = function(*x, case.reset())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, _ = compiled(*x, case.reset())
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(t.grad is not None for t in x)
