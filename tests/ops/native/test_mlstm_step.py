"""The native mLSTM step equals the float64 definition under every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from openxlstm.ops import explain, mlstm_step
from openxlstm.state import mLSTMState

SHAPES = [(1, 1, 1, 1), (2, 3, 16, 17), (3, 2, 5, 48), (1, 2, 80, 130), (1, 1, 256, 512), (0, 2, 4, 4)]
GATES = [("exp", True), ("sigmoid", True), ("sigmoid", False)]


def random_inputs(batch, heads, qk_dim, v_dim, dtype=torch.float32):
    x = [torch.randn(batch, heads, d).to(dtype) for d in (qk_dim, qk_dim, v_dim)]
    x += [torch.randn(batch, heads) for _ in range(2)]
    state = (
        torch.randn(batch, heads, qk_dim, v_dim),
        torch.randn(batch, heads, qk_dim),
        torch.randn(batch, heads),
    )
    return x, mLSTMState(*state)


def definition(x, state, **options):
    x, state = [t.double() for t in x], mLSTMState(*(s.double() for s in state))
    h, new = mlstm_step(*x, state, backend="recurrent", **options)
    return h, *new


def native_step(x, state, **options):
    h, new = mlstm_step(*x, state, backend="native", **options)
    return h, *new


@pytest.mark.parametrize(("input_gate", "normalize"), GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(isa, rel_error, shape, input_gate, normalize):
    x, state = random_inputs(*shape)
    before = [s.clone() for s in state]
    options = {"input_gate": input_gate, "normalize": normalize}
    actual, expected = native_step(x, state, **options), definition(x, state, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert rel_error(a, e) < 5e-6
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_extreme_gates(isa, rel_error, input_gate):
    values = [-math.inf, -1e3, -20.0, 0.0, 20.0, 1e3]
    pairs = [(i, f) for i in values for f in [*values, math.inf]]
    x, state = random_inputs(len(pairs), 1, 6, 9)
    x[3], x[4] = torch.tensor(pairs)[:, :1], torch.tensor(pairs)[:, 1:]
    options = {"input_gate": input_gate}
    actual, expected = native_step(x, state, **options), definition(x, state, **options)
    h, low = mlstm_step(*x, state, backend="recurrent", **options)  # float32 rounds gates of 1000 to 6e-5
    for a, e, d in zip(actual, expected, (h, *low), strict=True):
        assert torch.isfinite(a).all()
        assert rel_error(a, e) < max(5e-6, 3 * rel_error(d, e))
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=2e-4)
    for s, e in zip(actual[1:], (0, 0, 0), strict=True):  # both gates shut: the empty state
        assert (s[0] == e).all()


def test_many_steps(isa, rel_error):
    _, state = random_inputs(2, 2, 16, 24)
    exact = tuple(state)
    for _ in range(300):
        x, _ = random_inputs(2, 2, 16, 24)
        x[4] = x[4] + 3
        _, *state = native_step(x, mLSTMState(*state))
        _, *exact = definition(x, mLSTMState(*exact))
    for a, e in zip(state, exact, strict=True):
        assert rel_error(a, e) < 1e-5


def test_bits_depend_on_neither_batch_nor_threads(isa, threads):
    x, state = random_inputs(3, 1, 33, 200)
    threads(1)
    together = native_step(x, state)
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(native_step(x, state), together, strict=True))
        for row in range(3):
            one = native_step([t[row : row + 1] for t in x], mLSTMState(*(s[row : row + 1] for s in state)))
            assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(one, together, strict=True))


def test_bfloat16_inputs_and_strides(isa, rel_error):
    x, state = random_inputs(2, 2, 16, 16, torch.bfloat16)
    transposed = mLSTMState(state.c.mT.contiguous().mT, state.n, state.m)
    h, *new = native_step(x, transposed)
    h_exact, *exact = definition(x, state)
    assert h.dtype == torch.bfloat16
    assert rel_error(h, h_exact) < 6e-3
    assert all(rel_error(a, e) < 5e-6 for a, e in zip(new, exact, strict=True))


def test_what_it_refuses(native):
    assert "mlstm_step/native: chosen by 'auto'" in explain("mlstm_step")
    assert "native: cannot: computes in float32, not float64" in explain("mlstm_step", dtype=torch.float64)
    assert "native: cannot: runs on CPUs, not on cuda" in explain("mlstm_step", device="cuda")
    x, state = random_inputs(1, 1, 2, 2)
    x[0].requires_grad_()
    with pytest.raises(
        ValueError, match="'native' of mlstm_step cannot serve this call: has no backward pass"
    ):
        native_step(x, state)
    assert mlstm_step(*x, state)[0].requires_grad
    with torch.no_grad():
        native_step(x, state)


def test_opcheck_and_compile(native):
    x, state = random_inputs(2, 2, 4, 6)
    utilities = ("test_schema", "test_faketensor")
    arguments = (*x, *state, False, True, 1e-6)
    torch.library.opcheck(torch.ops.openxlstm.mlstm_step_native.default, arguments, test_utils=utilities)
    compiled = torch.compile(lambda *x: mlstm_step(*x, state), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*x)[0], native_step(x, state)[0])
