"""The native recurrent operator equals the float64 definition under every instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openxlstm.ops import explain, rnn
from openxlstm.ops.rnn.cells import CELLS

FLOORS = [("slstm", None), ("slstm", 1.0), ("lstm", None), ("gru", None), ("elman", None)]
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 3), (1, 40, 1, 8), (7, 12, 3, 21), (9, 20, 2, 48)]


def random_inputs(cell: str, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """x, weight, bias and the leaves of a state in mid-document."""
    batch, time, heads, d = shape
    kind = CELLS[cell]
    leaves = [torch.randn(batch, heads, d).tanh() for _ in kind.state_type._fields]
    if cell == "slstm":
        leaves[2] = leaves[2].abs() * 2 + 0.1
    x = torch.randn(batch, time, len(kind.input_gates), heads, d)
    weight = torch.randn(len(kind.recurrent_gates), heads, d, d) / d**0.5
    return [x, weight, torch.randn(len(kind.bias_gates), heads, d), *leaves]


def run(
    cell: str, tensors: list[Tensor], backend: str = "native", on: str = "both", **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random loss on h, on the last state, or on both."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    x, weight, bias, *leaves = inputs
    state = CELLS[cell].state_type(*leaves)
    h, last = rnn(cell, x, weight, bias, state=state, return_state=True, backend=backend, **options)
    outputs = [h, *last]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    chosen = {"h": slice(0, 1), "state": slice(1, None), "both": slice(0, None)}[on]
    loss = sum((o * w).sum() for o, w in zip(outputs[chosen], weights[chosen], strict=True))
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [o.detach() for o in outputs], list(gradients)


def assert_close(actual, tensors, cell, rel_error, **options):
    """Compare with the definition in float64; float32 arithmetic of the definition sets the scale."""
    exact = run(cell, [t.double() for t in tensors], "recurrent", **options)
    low = run(cell, tensors, "recurrent", **options)
    for which, tolerance in ((0, 5e-6), (1, 2e-5)):
        for a, e, d in zip(actual[which], exact[which], low[which], strict=True):
            assert a.shape == e.shape
            close = torch.allclose(a.double(), e, rtol=0, atol=1e-6)
            assert close or rel_error(a, e) < max(tolerance, 3 * rel_error(d, e))


@pytest.mark.parametrize("on", ["h", "state", "both"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cell", "floor"), FLOORS)
def test_equals_the_definition(isa, rel_error, cell, floor, shape, with_reset, on):
    tensors = random_inputs(cell, shape)
    options = {"reset": torch.rand(shape[:2]) < 0.2} if with_reset else {}
    options |= {"normalizer_floor": floor, "on": on}
    assert_close(run(cell, tensors, **options), tensors, cell, rel_error, **options)


@pytest.mark.parametrize(("cell", "floor"), FLOORS)
def test_without_gradients_nothing_changes(isa, cell, floor):
    x, weight, bias, *leaves = random_inputs(cell, (3, 17, 2, 12))
    options = {"reset": torch.rand(3, 17) < 0.2, "normalizer_floor": floor}
    with_grad, _ = run(cell, [x, weight, bias, *leaves], **options)
    state = CELLS[cell].state_type(*leaves)
    h, last = rnn(cell, x, weight, bias, state=state, return_state=True, backend="native", **options)
    assert all(torch.equal(a, b) for a, b in zip((h, *last), with_grad, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_bits_depend_on_neither_batch_nor_threads(isa, threads, cell):
    tensors = random_inputs(cell, (11, 6, 1, 20))
    threads(1)
    together = run(cell, tensors)
    for count in (1, 2, 3):
        threads(count)
        outputs, gradients = run(cell, tensors)
        assert all(torch.equal(a, b) for a, b in zip(outputs, together[0], strict=True))
        assert torch.equal(gradients[0], together[1][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients[3:], together[1][3:], strict=True))
    for rows in (slice(0, 1), slice(4, 7), slice(9, 11)):
        x, weight, bias, *leaves = tensors
        alone = rnn(
            cell,
            x[rows],
            weight,
            bias,
            state=CELLS[cell].state_type(*(s[rows] for s in leaves)),
            return_state=True,
            backend="native",
        )
        for a, b in zip((alone[0], *alone[1]), together[0], strict=True):
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("cell", CELLS)
def test_extreme_gates(isa, cell):
    x, weight, bias, *leaves = random_inputs(cell, (36, 3, 1, 5))
    values = torch.tensor([-1e3, -20.0, 0.0, 20.0, 1e3, -math.inf])
    for gate in range(min(2, x.shape[2])):
        x[:, 1, gate] = (
            values.repeat_interleave(6)[:, None, None] if gate else values.repeat(6)[:, None, None]
        )
    if cell == "slstm":  # i = f = -inf has no defined result
        x[:, 1, 0] = x[:, 1, 0].clamp(min=-1e3)
    state = CELLS[cell].state_type(*leaves)
    exact_state = CELLS[cell].state_type(*(s.double() for s in leaves))
    h, last = rnn(cell, x, weight, bias, state=state, return_state=True, backend="native")
    doubles = [t.double() for t in (x, weight, bias)]
    expected = rnn(cell, *doubles, state=exact_state, return_state=True, backend="recurrent")
    for a, e in zip((h, *last), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-4, atol=2e-5)  # gates of 1000 round to 6e-5


def test_nothing_crosses_a_reset(isa):
    x, weight, bias, *_ = random_inputs("slstm", (2, 6, 2, 9))
    x[0, :3] = math.nan
    x.requires_grad_()
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 3] = True
    h = rnn("slstm", x, weight, bias, reset=reset, backend="native")
    fresh = rnn("slstm", x[:, 3:], weight, bias, backend="native")
    assert torch.equal(h[:, 3:], fresh)
    (gradient,) = torch.autograd.grad(h[:, 3:].sum(), x)
    assert (gradient[:, :3].nan_to_num(nan=0.0) == 0).all()
    assert torch.isfinite(gradient[1]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_strides_and_documents(isa, rel_error, cell):
    x, weight, bias, *_ = random_inputs(cell, (1, 14, 2, 10))
    head_first = x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    h = rnn(cell, x, weight, bias, backend="native")
    assert torch.equal(rnn(cell, head_first, weight.mT.contiguous().mT, backend="native", bias=bias), h)
    low = rnn(cell, x.bfloat16(), weight, bias, backend="native")
    assert low.dtype == torch.bfloat16
    assert rel_error(low, rnn(cell, x.bfloat16().float(), weight, bias, backend="native")) < 4e-3
    cu_seqlens = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
    packed = rnn(cell, x, weight, bias, cu_seqlens=cu_seqlens, backend="native")
    assert torch.equal(packed[:, 5:], rnn(cell, x[:, 5:], weight, bias, backend="native"))
    assert rnn(cell, x[:0], weight, bias, backend="native").shape == (0, 14, 2, 10)


def test_ties_of_the_stabiliser(isa, rel_error):
    """Open forget gates, equal input gates: both arguments of the maximum are equal at every step."""
    tensors = random_inputs("slstm", (2, 6, 2, 3))
    tensors[0][:, :, 0], tensors[0][:, :, 1] = 0.0, 1000.0
    tensors[1].zero_(), tensors[2].zero_(), tensors[6].zero_()
    assert_close(run("slstm", tensors), tensors, "slstm", rel_error)


@pytest.mark.parametrize(("cell", "floor"), [("slstm", 1.0), ("lstm", None), ("gru", None), ("elman", None)])
def test_opcheck(native, cell, floor):
    x, weight, bias, *leaves = (t.requires_grad_() for t in random_inputs(cell, (2, 3, 2, 2)))
    state = torch.stack(leaves).transpose(1, 2).detach().requires_grad_()
    reset = torch.tensor([[False, True, False], [True, False, False]])
    arguments = (cell, x, weight, bias, state, reset, floor, True)
    torch.library.opcheck(torch.ops.openxlstm.rnn_native.default, arguments)
    with torch.no_grad():
        h, last, *saved = torch.ops.openxlstm.rnn_native(*arguments)
    quick = ("test_schema", "test_faketensor")
    for d_last in (None, torch.ones_like(last)):
        arguments = (cell, torch.ones_like(h), d_last, weight.detach(), reset, *saved, floor)
        torch.library.opcheck(torch.ops.openxlstm.rnn_native_backward.default, arguments, test_utils=quick)


def test_compiles_as_one_graph(native):
    x, weight, bias, *_ = random_inputs("slstm", (2, 4, 2, 3))

    def loss(x):
        return rnn("slstm", x, weight, bias).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (loss, compiled):
        y = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(y), y)[0])
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), loss(x))


def test_what_it_refuses(native):
    assert "rnn/native: chosen by 'auto'" in explain("rnn")
    assert "rnn/native: cannot: computes in float32, not float64" in explain("rnn", dtype=torch.float64)
    assert "rnn/native: cannot: runs on CPUs, not on cuda" in explain("rnn", device="cuda")
