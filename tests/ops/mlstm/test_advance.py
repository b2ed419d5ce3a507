"""A few tokens in place, and single tokens, on the portable and the Triton backend."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from openxlstm.ops import mlstm, mlstm_advance, mlstm_step
from openxlstm.state import mLSTMState

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # older interpreters
GATES = [("exp", True), ("sigmoid", True), ("sigmoid", False)]
SMALL = Case(batch=2, time=3, heads=2, with_state=True)


@pytest.fixture(params=["chunkwise", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend; skips Triton where it is not installed."""
    if request.param == "triton":
        request.getfixturevalue("device")
    return request.param


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def prepare(case: Case, backend: str, dtype=torch.float32) -> tuple[list, mLSTMState, list, mLSTMState]:
    """Inputs and state, and both again in float64."""
    x = {name: t.to(device_of(backend)) for name, t in case.inputs(dtype).items()}
    exact = {name: t.double() for name, t in x.items()}
    return (
        [x[n] for n in "qkvif"],
        mLSTMState(x["c0"], x["n0"], x["m0"]),
        [exact[n] for n in "qkvif"],
        mLSTMState(exact["c0"], exact["n0"], exact["m0"]),
    )


@pytest.mark.parametrize(("input_gate", "normalize"), GATES)
@pytest.mark.parametrize(("qk_dim", "v_dim"), [(8, 12), (1, 1), (80, 17), (130, 40)])
def test_equals_the_definition(backend, input_gate, normalize, qk_dim, v_dim, rel_error):
    case = SMALL.but(input_gate=input_gate, qk_dim=qk_dim, v_dim=v_dim, forget_all_at=(1,))
    inputs, state, exact, exact_state = prepare(case, backend)
    options = {"input_gate": input_gate, "normalize": normalize}
    expected, last = mlstm(*exact, state=exact_state, return_state=True, backend="recurrent", **options)
    h = mlstm_advance(*inputs, state, backend=backend, **options)
    for a, e in zip((h, *state), (expected, *last), strict=True):
        assert rel_error(a, e) < 5e-6


def test_slots(backend, rel_error):
    """Rows find their states, skipped rows and other slots stay as they are."""
    case = SMALL.but(batch=3)
    inputs, _, exact, _ = prepare(case, backend)
    _, state, _, exact_state = prepare(SMALL.but(batch=5, seed=3), backend)
    before = mLSTMState(*(s.clone() for s in state))
    slots = torch.tensor([4, -1, 1], dtype=torch.int32, device=inputs[0].device)
    h = mlstm_advance(*inputs, state, slots=slots, backend=backend)
    for row, slot in ((0, 4), (2, 1)):
        own = mLSTMState(*(s[slot : slot + 1] for s in exact_state))
        expected, last = mlstm(
            *(x[row : row + 1] for x in exact), state=own, return_state=True, backend="recurrent"
        )
        assert rel_error(h[row], expected[0]) < 5e-6
        assert all(rel_error(s[slot], e[0]) < 5e-6 for s, e in zip(state, last, strict=True))
    assert not h[1].any()
    for slot in (0, 2, 3):
        assert all(torch.equal(s[slot], b[slot]) for s, b in zip(state, before, strict=True))


@pytest.mark.parametrize("time", [0, 1, 34])
def test_any_number_of_tokens(backend, time, rel_error):
    case = SMALL.but(batch=1, heads=1, time=time, qk_dim=4, v_dim=4)
    inputs, state, exact, exact_state = prepare(case, backend)
    expected, last = mlstm(*exact, state=exact_state, return_state=True, backend="recurrent")
    h = mlstm_advance(*inputs, state, backend=backend)
    assert h.shape == expected.shape
    assert all(rel_error(a, e) < 5e-6 for a, e in zip((h, *state), (expected, *last), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_gates_and_states_in_float32(backend, dtype, rel_error):
    """0.999 is 1.0 in bfloat16: a model could not forget slowly."""
    inputs, state, exact, exact_state = prepare(SMALL.but(forget_mean=7.0), backend, dtype)
    expected, last = mlstm(*exact, state=exact_state, return_state=True, backend="recurrent")
    h = mlstm_advance(*inputs, state, backend=backend)
    assert h.dtype == dtype
    assert rel_error(h, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    tolerance = 5e-6 if backend == "triton" else 1e-2  # the chunkwise products may run in bfloat16
    assert all(rel_error(a, e) < tolerance for a, e in zip(state, last, strict=True))


@pytest.mark.parametrize(("input_gate", "normalize"), GATES)
def test_single_steps(device, input_gate, normalize, rel_error):
    case = SMALL.but(input_gate=input_gate)
    inputs, state, exact, exact_state = prepare(case, "triton")
    options = {"input_gate": input_gate, "normalize": normalize}
    given = mLSTMState(*(s.clone() for s in state))
    for t in range(case.time):
        h, state = mlstm_step(*(x[:, t] for x in inputs), state, backend="triton", **options)
        expected, exact_state = mlstm_step(
            *(x[:, t] for x in exact), exact_state, backend="recurrent", **options
        )
        for a, e in zip((h, *state), (expected, *exact_state), strict=True):
            assert rel_error(a, e) < 5e-6
    assert all(torch.equal(a, b) for a, b in zip(given, prepare(case, "triton")[1], strict=True))
    with pytest.raises(ValueError, match="has no backward pass"):
        mlstm_step(*(x[:, 0].requires_grad_() for x in inputs), state, backend="triton")


def test_opcheck(device):
    inputs, state, _, _ = prepare(SMALL, "triton")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    step = torch.ops.openxlstm.mlstm_step_triton.default
    torch.library.opcheck(step, (*(x[:, 0] for x in inputs), *state, False, True, 1e-6), test_utils=tests)
    advance = torch.ops.openxlstm.mlstm_advance_triton.default
    slots = torch.tensor([1, 0], device=inputs[0].device)
    torch.library.opcheck(advance, (*inputs, *state, slots, False, True, 1e-6), test_utils=tests)


def test_compiles_without_graph_breaks(backend):
    inputs, state, _, _ = prepare(SMALL, backend)
    if backend == "chunkwise":
        pytest.skip("gathers rows by value")
    slots = torch.tensor([1, 0], device=inputs[0].device)
    other = mLSTMState(*(s.clone() for s in state))

    def function(*inputs):
        return mlstm_advance(*inputs, state, slots=slots, backend=backend) * 2

    expected = mlstm_advance(*inputs, other, slots=slots, backend=backend) * 2
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(state, other)


def test_mistakes():
    inputs, state, _, _ = prepare(SMALL, "chunkwise")
    with pytest.raises(ValueError, match=r"slots must be integers of shape \(B,\) = \(2,\)"):
        mlstm_advance(*inputs, state, slots=torch.tensor([0.5, 1.0]))
    strided = state._replace(c=state.c.mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"state\.c must be contiguous"):
        mlstm_advance(*inputs, strided)
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        mlstm_advance(*inputs, state, backend="tritn")
