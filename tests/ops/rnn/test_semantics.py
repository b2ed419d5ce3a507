"""What holds for every backend: splitting, documents, rows, causality, extremes, long runs, determinism."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from openxlstm.ops.rnn import rnn, rnn_initial_state
from openxlstm.ops.rnn.cells import CELLS

backends = pytest.mark.parametrize("backend", ["recurrent", "scan"])
cells = pytest.mark.parametrize("cell", list(CELLS))


@backends
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_splitting_through_the_state_changes_nothing(make_case, cell_and_floor, backend, cut):
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 7, 2, 3), floor=floor)
    reset = torch.rand(2, 7) < 0.2

    def halves(*tensors):
        x, weight, bias, *leaves = tensors
        first, *middle = case.run(x[:, :cut], weight, bias, *leaves, backend=backend, reset=reset[:, :cut])
        second, *last = case.run(x[:, cut:], weight, bias, *middle, backend=backend, reset=reset[:, cut:])
        return torch.cat((first, second), 1), *last

    whole = [t.clone().requires_grad_() for t in case.tensors()]
    parts = [t.clone().requires_grad_() for t in case.tensors()]
    expected, actual = case.run(*whole, backend=backend, reset=reset), halves(*parts)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((o * o).sum() for o in outputs), inputs, materialize_grads=True)
        for outputs, inputs in ((actual, parts), (expected, whole))
    ]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@backends
@pytest.mark.parametrize(
    "lengths",
    [[4, 3, 5], [0, 4, 0, 0, 3, 1, 5, 0], [12], [1] * 12, [3, 3, 3, 3]],
    ids=str,
)
def test_packed_equals_separate(make_case, cell_and_floor, backend, lengths):
    cell, floor = cell_and_floor
    time, documents = sum(lengths), len(lengths)
    case = make_case(cell, (1, time, 2, 3), floor=floor, states=documents)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def separate(*tensors):
        x, weight, bias, *leaves = tensors
        results = []
        for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own = [leaf[n : n + 1] for leaf in leaves]
            results.append(case.run(x[:, begin:end], weight, bias, *own, backend=backend))
        h, *last = zip(*results, strict=True)
        return torch.cat(h, 1), *(torch.cat(leaf) for leaf in last)

    together = [t.clone().requires_grad_() for t in case.tensors()]
    alone = [t.clone().requires_grad_() for t in case.tensors()]
    actual = case.run(*together, backend=backend, cu_seqlens=cu_seqlens)
    expected = separate(*alone)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((o * o).sum() for o in outputs), inputs, materialize_grads=True)
        for outputs, inputs in ((actual, together), (expected, alone))
    ]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@backends
def test_resets_equal_packed_documents(make_case, cell_and_floor, backend):
    cell, floor = cell_and_floor
    case = make_case(cell, (1, 9, 2, 3), floor=floor)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, [2, 3, 7]] = True
    cu_seqlens = torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32)
    empty = rnn_initial_state(cell, 4, 2, 3, dtype=torch.float64)
    leaves = [torch.cat((leaf, rest[1:])) for leaf, rest in zip(case.state, empty, strict=True)]
    h, *last = case.run(backend=backend, reset=reset)
    packed, *states = case.run(
        case.x, case.weight, case.bias, *leaves, backend=backend, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(h, packed, rtol=1e-12, atol=1e-12)
    for a, e in zip(last, states, strict=True):
        torch.testing.assert_close(a, e[-1:], rtol=1e-12, atol=1e-12)


@backends
def test_nothing_crosses_a_boundary(make_case, cell_and_floor, backend):
    """Exactly zero gradient, and not even NaN passes."""
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 6, 2, 3), floor=floor)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = True
    inputs = [t.clone().requires_grad_() for t in case.tensors()]
    h, *last = case.run(*inputs, backend=backend, reset=reset)
    loss = h[0, 3:].sum() + sum(leaf[0].sum() for leaf in last)
    d_x, _, _, *d_state = torch.autograd.grad(loss, inputs)
    assert not d_x[0, :3].any()
    assert d_x[0, 3:].any()
    assert not d_x[1].any()
    assert not any(d.any() for d in d_state)

    poisoned = case.x.clone()
    poisoned[0, :3] = torch.nan
    bad = case.run(poisoned, *case.tensors()[1:], backend=backend, reset=reset)
    assert torch.equal(bad[0][0, 3:], h[0, 3:])
    assert torch.equal(bad[0][1], h[1])
    for a, e in zip(bad[1:], last, strict=True):
        assert torch.equal(a, e)


@backends
@cells
def test_a_reset_at_the_first_position_ignores_the_state(make_case, cell, backend):
    case = make_case(cell, (1, 4, 1, 2))
    reset = torch.tensor([[True, False, False, False]])
    empty = rnn_initial_state(cell, 1, 1, 2, dtype=torch.float64)
    fresh = case.run(case.x, case.weight, case.bias, *empty, backend=backend)
    after = case.run(backend=backend, reset=reset)
    assert all(torch.equal(a, b) for a, b in zip(fresh, after, strict=True))


@backends
@cells
def test_rows_do_not_touch_each_other(make_case, cell, backend):
    case = make_case(cell, (3, 20, 2, 8), dtype=torch.float32)
    h, gradients = (r[0] for r in case.run_with_gradients(backend=backend))
    other = case.x.clone()
    other[1:] = 100 * torch.randn_like(other[1:])
    h2, gradients2 = (r[0] for r in case._replace(x=other).run_with_gradients(backend=backend))
    assert torch.equal(h[0], h2[0])
    assert torch.equal(gradients[0], gradients2[0])


@backends
@cells
def test_causal(make_case, cell, backend):
    case = make_case(cell, (2, 8, 2, 3), dtype=torch.float32)
    later = case.x.clone()
    later[:, 5:] += 1
    h, h2 = (case.run(x, *case.tensors()[1:], backend=backend)[0] for x in (case.x, later))
    assert torch.equal(h[:, :5], h2[:, :5])
    assert not torch.equal(h[:, 5:], h2[:, 5:])


@backends
@cells
def test_deterministic_and_pure(make_case, cell, backend):
    case = make_case(cell, (2, 20, 2, 8), dtype=torch.float32)
    before = [t.clone() for t in case.tensors()]
    first, second = (case.run_with_gradients(backend=backend) for _ in range(2))
    assert all(
        torch.equal(a, b) for p, q in zip(first, second, strict=True) for a, b in zip(p, q, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, case.tensors(), strict=True))


@backends
@cells
@pytest.mark.parametrize("time", [0, 1])
def test_short_sequences(make_case, cell, backend, time):
    case = make_case(cell, (2, time, 2, 3))
    outputs, gradients = case.run_with_gradients(backend=backend)
    assert outputs[0].shape == (2, time, 2, 3)
    assert gradients[0].shape == case.x.shape
    if time == 0:
        assert all(torch.equal(a, b) for a, b in zip(outputs[1:], case.state, strict=True))


@backends
@cells
def test_an_empty_batch(make_case, cell, backend):
    outputs, gradients = make_case(cell, (0, 3, 2, 4)).run_with_gradients(backend=backend)
    assert outputs[0].shape == (0, 3, 2, 4)
    assert not any(g.any() for g in gradients)


def test_no_documents_at_all(make_case):
    case = make_case("slstm", (1, 0, 2, 3), states=3)
    h, *last = case.run(cu_seqlens=torch.zeros(4, dtype=torch.int32))
    assert h.shape == (1, 0, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(last, case.state, strict=True))
    h = rnn("slstm", case.x, case.weight, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert h.shape == (1, 0, 2, 3)


@backends
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("low", [-1e3, -60.0])
def test_extreme_gates_stay_finite(make_case, cell_and_floor, backend, empty, low):
    cell, floor = cell_and_floor
    for dtype in (torch.float32, torch.float64):
        case = make_case(cell, (2, 12, 2, 4), floor=floor, dtype=dtype, empty=empty)
        case = case._replace(x=torch.where(torch.rand(case.x.shape) < 0.5, low, -low).to(dtype))
        outputs, gradients = case.run_with_gradients(backend=backend)
        assert all(t.isfinite().all() for t in (*outputs, *gradients))
        assert outputs[0].abs().max() <= 1 + 1e-6 or not empty


@backends
def test_infinite_gates(make_case, backend):
    case = make_case("slstm", (2, 6, 2, 3))
    case.x[:, 2, 1] = -torch.inf  # forget everything
    case.x[:, 3, 1] = torch.inf  # forget nothing
    case.x[:, 4, 0] = -torch.inf  # add nothing
    case.x[0, 1, 2], case.x[1, 1, 2] = torch.inf, -torch.inf
    case.x[0, 5, 3], case.x[1, 5, 3] = torch.inf, -torch.inf
    outputs, gradients = case.run_with_gradients(backend=backend)
    assert all(t.isfinite().all() for t in (*outputs, *gradients))

    still = case._replace(weight=torch.zeros_like(case.weight))
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 2] = True
    forgotten, started = still.run(backend=backend), still.run(backend=backend, reset=reset)
    torch.testing.assert_close(forgotten[0][:, 2:], started[0][:, 2:], rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs(make_case, rel_error, cell_and_floor, dtype, tolerance, backend):
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 6, 2, 4), floor=floor, dtype=dtype)
    exact = case._replace(x=case.x.float()).run_with_gradients(backend="recurrent")
    outputs, gradients = case.run_with_gradients(backend=backend)
    assert outputs[0].dtype == dtype
    assert gradients[0].dtype == dtype
    assert all(t.dtype == torch.float32 for t in (*outputs[1:], *gradients[1:]))
    for a, e in zip((*outputs, *gradients), (*exact[0], *exact[1]), strict=True):
        assert rel_error(a, e) < tolerance


@pytest.mark.slow
def test_long_runs_do_not_drift(rel_error):
    """20 000 steps with nearly open forget gates: float32 stays with float64."""
    torch.manual_seed(0)
    time = 20_000
    x = torch.randn(1, time, 4, 1, 4, dtype=torch.float32)
    x[:, :, 1] += torch.linspace(4, 20, 4)
    weight = 0.3 * torch.randn(4, 1, 4, 4)
    low, low_state = rnn("slstm", x, weight, return_state=True)
    high, high_state = rnn("slstm", x.double(), weight.double(), return_state=True)
    assert rel_error(low, high) < 1e-4
    assert all(rel_error(a, b) < 1e-4 for a, b in zip(low_state, high_state, strict=True))
    assert low.isfinite().all()


def test_outputs_without_gradients_are_the_same(make_case, cell_and_floor):
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 700, 1, 2), floor=floor)
    reset = torch.rand(2, 700) < 0.01
    with torch.no_grad():
        quiet = case.run(reset=reset)
    recorded = case.run(*(t.clone().requires_grad_() for t in case.tensors()), reset=reset)
    assert all(torch.equal(a, b) for a, b in zip(quiet, recorded, strict=True))
