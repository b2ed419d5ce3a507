"""The native causal convolution equals the portable definition in float64 under every instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openxlstm.ops import causal_convolution, explain

# batch, time, channels, taps: blocks of 64 positions, vectors of 4 to 16 channels, and what is left over
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 3, 4),
    (2, 64, 21, 4),
    (1, 131, 33, 4),
    (3, 66, 16, 2),
    (2, 7, 5, 9),
    (1, 130, 8, 70),
]


def random_inputs(shape: tuple[int, int, int, int], bias: bool = True) -> list[Tensor | None]:
    """x, weight, bias and state."""
    batch, time, channels, taps = shape
    x, weight = torch.randn(batch, time, channels), torch.randn(channels, taps)
    return [x, weight, torch.randn(channels) if bias else None, torch.randn(batch, taps - 1, channels)]


def run(
    tensors: list[Tensor | None], backend: str = "native", **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random loss on both."""
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    x, weight, bias, state = inputs
    outputs = causal_convolution(x, weight, bias, state=state, return_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, [t for t in inputs if t is not None], materialize_grads=True)
    return [o.detach() for o in outputs], list(gradients)


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(isa, rel_error, shape, with_reset, silu):
    tensors = random_inputs(shape, bias=not with_reset)
    options: dict[str, Any] = {"silu": silu}
    if with_reset:
        options["reset"] = torch.rand(shape[:2]) < 0.2
    actual, exact = run(tensors, **options), run(doubled(tensors), "portable", **options)
    for which, tolerance in ((0, 5e-6), (1, 2e-5)):
        for a, e in zip(actual[which], exact[which], strict=True):
            assert a.shape == e.shape
            assert rel_error(a, e) < tolerance


@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
def test_bfloat16_is_no_worse_than_pytorch(isa, rel_error, silu):
    rounded = [t.bfloat16() for t in random_inputs((2, 70, 40, 4))]
    options = {"silu": silu, "reset": torch.rand(2, 70) < 0.1}
    actual, low = run(rounded, **options), run(rounded, "portable", **options)
    exact = run(doubled(rounded), "portable", **options)
    for which in (0, 1):
        for a, p, e in zip(actual[which], low[which], exact[which], strict=True):
            assert a.dtype == p.dtype
            assert rel_error(a, e) <= max(1.01 * rel_error(p, e), 4e-3)


@pytest.mark.parametrize("time", [0, 1, 2, 3, 130])
def test_split_anywhere(isa, time):
    x, weight, bias, state = random_inputs((2, time, 6, 4))
    reset = torch.rand(2, time) < 0.1
    whole, last = run_values(x, weight, bias, state, reset)
    for split in range(0, time + 1, max(1, time // 10)):
        first, middle = run_values(x[:, :split], weight, bias, state, reset[:, :split])
        second, end = run_values(x[:, split:], weight, bias, middle, reset[:, split:])
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert torch.equal(end, last)


def run_values(x, weight, bias, state, reset):
    return causal_convolution(
        x, weight, bias, state=state, return_state=True, reset=reset, silu=True, backend="native"
    )


def test_no_positions_and_no_rows_have_gradients(isa):
    for shape in ((2, 0, 6, 4), (0, 5, 6, 4)):
        (y, last), gradients = run(random_inputs(shape), silu=True)
        assert y.shape == shape[:3]
        assert last.shape == (shape[0], 3, 6)
        assert all((g == 0).all() for g in gradients[:3])


def test_bits_depend_on_neither_batch_nor_threads(isa, threads):
    tensors = random_inputs((5, 150, 20, 4))
    threads(1)
    together = run(tensors, silu=True)
    for count in (1, 2, 3):
        threads(count)
        again = run(tensors, silu=True)
        for which in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(again[which], together[which], strict=True))
    x, weight, bias, state = tensors
    alone, _ = run_values(x[3:4], weight, bias, state[3:4], None)
    assert torch.equal(alone, together[0][0][3:4])


def test_nothing_crosses_a_reset(isa):
    x, weight, bias, state = random_inputs((2, 9, 5, 4))
    x[0, :3], state[0] = math.nan, math.inf
    x.requires_grad_()
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 3] = True
    y, _ = run_values(x, weight, bias, state, reset)
    assert torch.equal(y[:, 3:], run_values(x[:, 3:], weight, bias, None, None)[0])
    (gradient,) = torch.autograd.grad(y[:, 3:].sum(), x)
    assert (gradient[:, :3] == 0)[1].all()
    assert torch.isfinite(gradient[:, 3:]).all()


def test_strides(isa):
    """Halves of a projection, time first, and channels that do not lie together."""
    x, weight, bias, state = random_inputs((2, 70, 12, 4))
    expected = run([x, weight, bias, state])
    wide = torch.cat([x, x + 1], -1)
    views = (wide[..., :12], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT)
    for view in views:
        y = causal_convolution(view, weight, bias, state=state, backend="native")
        assert torch.equal(y, expected[0][0])
    leaf = x.clone().requires_grad_()
    y = causal_convolution(leaf, weight, bias, state=state, backend="native")
    (expanded,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)  # a gradient without strides
    (plain,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(expanded, plain)


@pytest.mark.parametrize("silu", [False, True])
def test_opcheck(native, silu):
    x, weight, bias, state = (t.requires_grad_() for t in random_inputs((2, 5, 3, 4)))
    for options in ((bias, state, torch.rand(2, 5) < 0.3), (None, state, None)):
        arguments = (x, weight, *options, silu)
        torch.library.opcheck(torch.ops.openxlstm.causal_convolution_native.default, arguments)
        quick = ("test_schema", "test_faketensor")
        values = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(
            torch.ops.openxlstm.causal_convolution_native_backward.default,
            (torch.ones_like(x), *values),
            test_utils=quick,
        )


def test_compiles_as_one_graph(native):
    x, weight, bias, state = random_inputs((2, 5, 3, 4))

    def loss(x):
        y, last = causal_convolution(x, weight, bias, state=state, return_state=True, silu=True)
        return y.square().sum() + last.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (loss, compiled):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(*gradients)


def test_what_it_refuses(native):
    assert "causal_convolution/native: chosen by 'auto'" in explain("causal_convolution")
    assert "native: can, when asked for by name" in explain("causal_convolution", time=1)
    assert "computes in float32, not float64" in explain("causal_convolution", dtype=torch.float64)
    assert "runs on CPUs, not on cuda" in explain("causal_convolution", device="cuda")
