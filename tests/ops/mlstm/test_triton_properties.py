"""What must hold of the Triton kernels whatever the numbers: symmetries, scales, splits, lengths, repetition.

On a GPU if there is one, else in Triton's interpreter. Outputs start as NaN, see :mod:`test_triton`.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from test_triton import SMALL, compare, inputs_of

from openxlstm.ops import mlstm, mlstm_advance
from openxlstm.state import mLSTMState

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # older interpreters
]
TRITON = {"backend": "triton", "chunk_size": 16}


def state_of(x: dict) -> mLSTMState:
    return mLSTMState(*(x[n] for n in ("c0", "n0", "m0")))


def everything(x: dict, reset=None, **options) -> list[torch.Tensor]:
    """h, the last state, and the gradients of a loss on all of them."""
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    h, last = mlstm(
        *(leaves[n] for n in "qkvif"), state=state_of(leaves), reset=reset, return_state=True,
        **TRITON | options,
    )  # fmt: skip
    loss = h.sin().sum() + sum(s.square().sum() for s in last)
    return [h, *last, *torch.autograd.grad(loss, list(leaves.values()))]


def test_three_runs_have_the_same_bits(device):
    case = SMALL.but(with_state=True, reset_every=8)
    runs = [everything(inputs_of(case, device), case.reset()) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_heads_and_rows_can_change_places(device):
    """Bit for bit."""
    x = inputs_of(SMALL.but(batch=2, heads=3, time=18, with_state=True), device)
    rows, heads = torch.tensor([1, 0]), torch.tensor([2, 0, 1])

    def moved(t, head_axis):
        return t[rows].index_select(head_axis, heads)

    axes = {"c0": 1, "n0": 1, "m0": 1}
    other = {n: moved(t, axes.get(n, 2)) for n, t in x.items()}
    expected, actual = everything(x), everything(other)
    for n, (one, two) in enumerate(zip(expected, actual, strict=True)):
        axis = 2 if n in (0, 4, 5, 6, 7, 8) else 1
        assert torch.equal(moved(one, axis), two), n


def test_splits_with_gradients_through_the_state(device, rel_error):
    """Two calls joined by the state are one call: values and gradients."""
    case = SMALL.but(with_state=True, reset_every=12)
    x, reset = inputs_of(case, device), case.reset()
    whole = everything(x, reset)
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    state, pieces = state_of(leaves), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 21)):
        h, state = mlstm(
            *(leaves[n][:, part] for n in "qkvif"), state=state, reset=reset[:, part], return_state=True,
            **TRITON,
        )  # fmt: skip
        pieces.append(h)
    loss = sum(h.sin().sum() for h in pieces) + sum(s.square().sum() for s in state)
    joined = [torch.cat(pieces, 1), *state, *torch.autograd.grad(loss, list(leaves.values()))]
    for one, two in zip(joined, whole, strict=True):
        assert rel_error(one, two) < 1e-5


@pytest.mark.parametrize("time", [15, 16, 17])
def test_lengths_around_a_chunk(time, device, rel_error):
    case = SMALL.but(time=time, heads=1, with_state=True)
    compare(case, inputs_of(case, device), rel_error, chunk_size=16)


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(48, 512), (512, 48), (17, 16)])
def test_more_head_dimensions(qk_dim, v_dim, device, rel_error):
    case = SMALL.but(heads=1, time=18, qk_dim=qk_dim, v_dim=v_dim, with_state=True)
    compare(case, inputs_of(case, device), rel_error, chunk_size=16)


def test_scales_of_q(device):
    """h does not depend on the length of q where |r| is the denominator, and is linear where exp(-m) is."""
    x = inputs_of(SMALL, device)

    def h(scale):
        return mlstm(x["q"] * scale, *(x[n] for n in "kvif"), eps=0.0, **TRITON)

    torch.testing.assert_close(h(2.0**18), h(2.0**16), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h(2.0**-16), h(2.0**-18) * 4, rtol=1e-5, atol=0)


def test_offset_of_the_input_gates(device, rel_error):
    """exp(i + c) scales numerator and normaliser alike, so h does not change where |r| is the denominator."""
    x = inputs_of(SMALL, device)
    q = x["q"] * 2.0**16
    h, other = (mlstm(q, x["k"], x["v"], x["i"] + c, x["f"], eps=0.0, **TRITON) for c in (0.0, 5.0))
    assert rel_error(other, h) < 1e-5


def test_scale_of_a_state_and_its_stabiliser(device, rel_error):
    """(C e^-d, n e^-d, m + d) is the same state."""
    x = inputs_of(SMALL.but(with_state=True), device)
    results = []
    for d in (0.0, 3.0):
        state = mLSTMState(x["c0"] * torch.tensor(-d).exp(), x["n0"] * torch.tensor(-d).exp(), x["m0"] + d)
        h, last = mlstm(*(x[n] for n in "qkvif"), state=state, return_state=True, eps=0.0, **TRITON)
        scale = last.m.double().exp()
        results.append([h, last.c * scale[..., None, None], last.n * scale[..., None]])
    assert all(rel_error(a, b) < 1e-5 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("closed", [-1e4, -torch.inf])
def test_closed_input_gates_give_zero(closed, device):
    x = inputs_of(SMALL, device)
    leaves = [x[n].requires_grad_() for n in "qkv"]
    h, last = mlstm(*leaves, torch.full_like(x["i"], closed), x["f"], return_state=True, **TRITON)
    assert not h.any()
    assert not last.c.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.sum(), leaves))


def test_forgetting_all_is_a_reset(device):
    """Bit for bit: a boundary through the gates and one through the mask."""
    case = SMALL.but(with_state=True)
    x = inputs_of(case, device)
    x["f"][:, 9] = -torch.inf
    reset = torch.zeros(1, case.time, dtype=torch.bool)
    reset[0, 9] = True
    forgotten = everything(x)
    both = everything(x, reset)
    assert all(torch.equal(a, b) for a, b in zip(forgotten, both, strict=True))


# --- long -------------------------------------------------------------------------------------------

LONG = Case(batch=1, heads=1, time=65536, qk_dim=4, v_dim=4)


def exact_states(x: dict) -> tuple[torch.Tensor, mLSTMState]:
    return mlstm(*(x[n].double() for n in "qkvif"), return_state=True, backend="chunkwise")


@pytest.mark.slow
@pytest.mark.parametrize("forget", [None, 20.0])
def test_errors_do_not_grow_over_64k_steps(forget, device, rel_error):
    """With ordinary gates, and with forget gates so open that everything is kept."""
    errors = []
    for time in (1024, LONG.time):
        x = inputs_of(LONG.but(time=time), device)
        if forget is not None:
            x["f"] = torch.full_like(x["f"], forget)
        expected, expected_last = exact_states(x)
        h, last = mlstm(*(x[n] for n in "qkvif"), return_state=True, backend="triton")
        assert all(rel_error(a, e) < 1e-5 for a, e in zip(last, expected_last, strict=True))
        errors.append((h.double() - expected).abs().median() / expected.abs().median())
    assert errors[1] < max(2 * errors[0], 1e-6)


@pytest.mark.slow
def test_decoding_64k_steps_is_the_whole_sequence(device, rel_error):
    x = inputs_of(LONG.but(forget_mean=6.0), device)
    expected, expected_last = exact_states(x)
    state = mLSTMState(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1))
    h = mlstm_advance(*(x[n] for n in "qkvif"), state, backend="triton")
    assert all(rel_error(a, e) < 1e-5 for a, e in zip(state, expected_last, strict=True))
    assert (h.double() - expected).abs().median() < 1e-5 * expected.abs().median()
