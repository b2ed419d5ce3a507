"""Backend ``native`` of the causal convolution: one pass over memory, on CPUs.

float32 or bfloat16 inputs and outputs (float16 goes through float32), float32 arithmetic. Every output is one
sum in the order of the taps; blocks of positions run in parallel and their shares of the gradients of weight
and bias are added in their order, so results do not depend on the number of threads. The backward pass keeps
nothing but the inputs and computes the convolution again where SiLU needs it.

Not twice differentiable; the backend ``portable`` is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import loader
from openxlstm.ops.native.operands import Operands

_BLOCK = 64  # positions of one task; the backward pass computes K - 1 more


class _Arguments(ctypes.Structure):
    """``Convolution`` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "channels", "taps", "block", "blocks")),
        ("bfloat16", ctypes.c_int32),
        ("silu", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("x_b", ctypes.c_int64),
        ("x_t", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("before", "weight", "bias", "reset", "y", "dy")),
        ("dy_b", ctypes.c_int64),
        ("dy_t", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("dx", "d_before", "d_weight", "d_bias")),
    )


def refuse(request: Request) -> str | None:
    """Why the native backend cannot serve a request, or None."""
    return loader.refuse(request, differentiable=True)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    """The convolution; arguments as for :func:`openxlstm.ops.convolution.portable.convolve`."""
    return _forward(x, weight, bias, before, reset, silu)


class _Call(Operands):
    """The arguments that forward and backward share, and the tensors that must outlive the call."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
    ) -> None:
        super().__init__()
        batch, time, channels = x.shape
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        blocks = (time + _BLOCK - 1) // _BLOCK
        sizes = (batch, time, channels, weight.shape[1], _BLOCK, blocks)
        self.arguments = a = _Arguments(*sizes, self.dtype == torch.bfloat16, silu)
        a.x, a.x_b, a.x_t = self.strided(x, self.dtype)
        a.before, a.weight = self.keep(before, self.dtype), self.keep(weight.t(), torch.float32)
        a.bias, a.reset = self.keep(bias, torch.float32), self.keep(reset)
        self.tasks = batch * blocks


@torch.library.custom_op("openxlstm::causal_convolution_native", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    call = _Call(x, weight, bias, before, reset, silu)
    y = torch.empty(x.shape, dtype=call.dtype)
    if y.numel():
        call.arguments.y = y.data_ptr()
        loader.call("oxl_convolution_forward", call.arguments)
    return y.to(x.dtype)


@torch.library.custom_op("openxlstm::causal_convolution_native_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    reset: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the inputs before."""
    call = _Call(x, weight, bias, before, reset, silu)
    a, (channels, taps) = call.arguments, weight.shape
    dx = torch.empty(x.shape, dtype=call.dtype)
    d_before = torch.zeros(before.shape)
    d_weight, d_bias = torch.empty(call.tasks, taps, channels), torch.empty(call.tasks, channels)
    if dx.numel():
        a.dy, a.dy_b, a.dy_t = call.strided(dy, call.dtype)
        a.dx, a.d_before, a.d_weight, a.d_bias = (t.data_ptr() for t in (dx, d_before, d_weight, d_bias))
        loader.call("oxl_convolution_backward", a)
    d_weight = d_weight.sum(0).t().to(weight.dtype).contiguous()
    return dx.to(x.dtype), d_weight, d_bias.sum(0).to(weight.dtype), d_before.to(before.dtype)


@_forward.register_fake
def _(x, weight, bias, before, reset, silu):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, weight, bias, before, reset, silu):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
        (before.new_empty(before.shape)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, before, reset, silu = inputs
    ctx.save_for_backward(x, weight, bias, before, reset)
    ctx.silu = silu


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, before, reset = ctx.saved_tensors
    dx, d_weight, d_bias, d_before = _backward(dy, x, weight, bias, before, reset, ctx.silu)
    return dx, d_weight, None if bias is None else d_bias.to(bias.dtype), d_before, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
