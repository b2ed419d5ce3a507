"""The backend ``scan`` equals the definition: values, every gradient, ties; and it is a proper op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.ops.rnn import rnn
from openxlstm.ops.rnn.cells import CELLS

SHAPES = [(1, 1, 1, 1), (2, 1, 2, 3), (1, 40, 1, 2), (3, 9, 2, 5), (2, 70, 4, 16)]


def assert_same(actual, expected, tolerance, rel_error):
    for which in (0, 1):
        for a, e in zip(actual[which], expected[which], strict=True):
            assert rel_error(a, e) < tolerance or torch.allclose(a, e, rtol=0, atol=tolerance)


@pytest.mark.parametrize("on", ["h", "state", "both"])
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(make_case, cell_and_floor, rel_error, shape, with_reset, on):
    cell, floor = cell_and_floor
    case = make_case(cell, shape, floor=floor)
    reset = torch.rand(shape[:2]) < 0.2 if with_reset else None
    expected = case.run_with_gradients(backend="recurrent", on=on, reset=reset)
    actual = case.run_with_gradients(backend="scan", on=on, reset=reset)
    assert_same(actual, expected, 1e-11, rel_error)


def test_float32_is_as_close_to_float64_as_the_definition(make_case, cell_and_floor, rel_error):
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 64, 2, 8), floor=floor)
    low = case._replace(
        x=case.x.float(),
        weight=case.weight.float(),
        bias=case.bias.float(),
        state=type(case.state)(*(s.float() for s in case.state)),
    )
    exact = case._replace(
        x=low.x.double(),
        weight=low.weight.double(),
        bias=low.bias.double(),
        state=type(case.state)(*(s.double() for s in low.state)),
    ).run_with_gradients(backend="recurrent")
    scan = low.run_with_gradients(backend="scan")
    definition = low.run_with_gradients(backend="recurrent")
    for which, tolerance in ((0, 5e-6), (1, 2e-5)):
        for s, d, e in zip(scan[which], definition[which], exact[which], strict=True):
            assert rel_error(s, e) < max(tolerance, 3 * rel_error(d, e))


@pytest.mark.parametrize("floor", [None, 1.0])
def test_ties_of_the_stabiliser(make_case, rel_error, floor):
    """Open forget gates and equal input gates: the two arguments of the maximum are equal at every step."""
    case = make_case("slstm", (2, 6, 2, 3), floor=floor)
    case = case._replace(weight=torch.zeros_like(case.weight), bias=torch.zeros_like(case.bias))
    case.x[:, :, 0] = 0.0
    case.x[:, :, 1] = 1000.0  # log sigmoid is exactly zero
    case.state.m.zero_()
    expected = case.run_with_gradients(backend="recurrent")
    assert_same(case.run_with_gradients(backend="scan"), expected, 1e-12, rel_error)


def test_without_bias_and_with_other_strides(make_case, cell_and_floor):
    cell, floor = cell_and_floor
    case = make_case(cell, (3, 6, 2, 4), floor=floor)
    head_first = case.x.permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)
    assert not head_first.is_contiguous()
    weight = case.weight.mT.contiguous().mT
    every_other = torch.stack((case.x, case.x), 2)[:, :, 0]
    expected = case.run(backend="recurrent")
    for x in (head_first, every_other):
        for a, e in zip(case.run(x, weight, case.bias, *case.state), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    plain = rnn(cell, head_first, weight, normalizer_floor=floor)
    zero = rnn(cell, case.x, case.weight, torch.zeros_like(case.bias), normalizer_floor=floor)
    torch.testing.assert_close(plain, zero, rtol=1e-12, atol=1e-12)


@given(
    cell=st.sampled_from(list(CELLS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(1, 4)),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_definition_for_any_documents(cell, shape, scale, data):
    batch, time, heads, d = shape
    kind = CELLS[cell]
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = scale * torch.randn(batch, time, len(kind.input_gates), heads, d, dtype=torch.float64)
    weight = torch.randn(len(kind.recurrent_gates), heads, d, d, dtype=torch.float64)
    bias = torch.randn(len(kind.bias_gates), heads, d, dtype=torch.float64)
    reset = torch.tensor(
        data.draw(
            st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=batch, max_size=batch)
        )
    )
    gradients = []
    for backend in ("scan", "recurrent"):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        h, last = rnn(cell, *inputs, reset=reset, return_state=True, backend=backend)
        loss = (h * h).sum() + sum(s.sum() for s in last)
        gradients.append([t.detach() for t in (h, *last, *torch.autograd.grad(loss, inputs))])
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize(("cell", "floor"), [("slstm", 1.0), ("lstm", None), ("gru", None), ("elman", None)])
def test_opcheck(make_case, cell, floor):
    case = make_case(cell, (2, 3, 2, 2))
    x, weight, bias, *leaves = (t.clone().requires_grad_() for t in case.tensors())
    state = torch.stack(leaves).transpose(1, 2).detach().requires_grad_()
    reset = torch.tensor([[False, True, False], [True, False, False]])
    arguments = (cell, x, weight, bias, state, reset, floor)
    torch.library.opcheck(torch.ops.openxlstm.rnn_scan.default, arguments)

    quick = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.openxlstm.rnn_scan.default, (cell, x, weight, None, state, None, floor), test_utils=quick
    )
    with torch.no_grad():
        h, last, *saved = torch.ops.openxlstm.rnn_scan(*arguments)
    for d_last in (None, torch.ones_like(last)):
        torch.library.opcheck(
            torch.ops.openxlstm.rnn_scan_backward.default,
            (cell, torch.ones_like(h), d_last, case.weight, reset, *saved, floor),
            test_utils=quick,
        )


@pytest.mark.parametrize("cell", ["slstm", "gru"])
def test_compiles_as_one_graph(make_case, cell):
    case = make_case(cell, (2, 4, 2, 3), dtype=torch.float32)
    reset = torch.tensor([[False, True, False, False], [False, False, False, True]])

    def loss(x, weight, bias):
        h, last = rnn(cell, x, weight, bias, state=case.state, return_state=True, reset=reset)
        return (h * h).sum() + last.h.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        inputs = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
        value = function(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_ignores_autocast(make_case):
    case = make_case("slstm", (2, 4, 2, 4), dtype=torch.float32)
    plain = case.run_with_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        under = case.run_with_gradients()
        definition = case.run(backend="recurrent")
    assert all(
        torch.equal(a, b) for p, u in zip(plain, under, strict=True) for a, b in zip(p, u, strict=True)
    )
    torch.testing.assert_close(definition[0], plain[0][0], rtol=1e-5, atol=1e-5)


def test_only_the_definition_is_twice_differentiable(make_case):
    case = make_case("elman", (1, 2, 1, 2))
    x = case.x.clone().requires_grad_()
    h = rnn("elman", x, case.weight, case.bias)
    (gradient,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_the_number_of_threads_is_restored_and_does_not_matter(make_case):
    case = make_case("slstm", (2, 5, 2, 4), dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(case.run_with_gradients())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
