"""Backend ``native`` of the head norm: one pass over memory forwards, one backwards, on CPUs.

float32 or bfloat16 inputs (others go through float32), float32 arithmetic; the normalised numbers are rounded
to the type of the inputs before the weight, as the published models do, and the result at the end. Blocks of
positions run in parallel and their shares of the gradients of weight, bias and skip weight are added in their
order, so results do not depend on the number of threads. The backward pass keeps nothing but the inputs.

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
from openxlstm.ops.normalization.portable import new_result, result_dtype

_BLOCK = 32  # positions of one task


class _Arguments(ctypes.Structure):
    """``HeadNorm`` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "d", "block", "blocks")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "y_bfloat16", "center", "silu")),
        ("eps", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("x_r", ctypes.c_int64),
        ("x_h", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scale", "bias", "skip_scale", "gate")),
        ("gate_r", ctypes.c_int64),
        ("skip", ctypes.c_void_p),
        ("skip_r", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("y", "dy", "dx", "d_gate", "d_skip")),
        *((name, ctypes.c_void_p) for name in ("d_scale", "d_bias", "d_skip_scale")),
    )


def refuse(request: Request) -> str | None:
    """Why the native backend cannot serve a request, or None."""
    return loader.refuse(request, differentiable=True)


class _Call(Operands):
    """The arguments that forward and backward share, and the tensors that must outlive the call."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        skip: Tensor | None,
        skip_scale: Tensor | None,
        eps: float,
        center: bool,
        silu: bool,
    ) -> None:
        super().__init__()
        *_, heads, d = x.shape
        rows = x.numel() // (heads * d) if x.numel() else 0
        self.out = result_dtype(x, scale, bias, gate, skip, skip_scale)
        low = all(t is None or t.dtype == torch.bfloat16 for t in (x, gate, skip))
        self.dtype = torch.bfloat16 if low else torch.float32
        self.y_dtype = torch.bfloat16 if low and self.out == torch.bfloat16 else torch.float32
        blocks = (rows + _BLOCK - 1) // _BLOCK
        kinds = (low, self.y_dtype == torch.bfloat16, center, silu)
        self.arguments = a = _Arguments(rows, heads, d, _BLOCK, blocks, *kinds, eps)
        a.x, a.x_r, a.x_h = self.strided(x.reshape(rows, heads, d), self.dtype)
        a.scale, a.bias, a.skip_scale = (self.keep(t, torch.float32) for t in (scale, bias, skip_scale))
        if gate is not None:
            a.gate, a.gate_r = self.strided(gate.reshape(rows, heads * d), self.dtype)
        if skip is not None:
            a.skip, a.skip_r = self.strided(skip.reshape(rows, heads * d), self.dtype)


@torch.library.custom_op("openxlstm::head_norm_native", mutates_args=())
def _forward(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_scale: Tensor | None,
    eps: float,
    center: bool,
    silu: bool,
) -> Tensor:
    call = _Call(x, scale, bias, gate, skip, skip_scale, eps, center, silu)
    y = torch.empty((*x.shape[:-2], x.shape[-2] * x.shape[-1]), dtype=call.y_dtype)
    if y.numel():
        call.arguments.y = y.data_ptr()
        loader.call("oxl_head_norm_forward", call.arguments)
    return y.to(call.out)


@torch.library.custom_op("openxlstm::head_norm_native_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_scale: Tensor | None,
    eps: float,
    center: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors; empty where one was not given."""
    call = _Call(x, scale, bias, gate, skip, skip_scale, eps, center, silu)
    a = call.arguments
    rows = [None if t is None else torch.empty(t.shape, dtype=call.dtype) for t in (x, gate, skip)]
    shares = [None if t is None else torch.empty(a.blocks, len(t)) for t in (scale, bias, skip_scale)]
    a.dy = call.keep(dy, call.y_dtype)
    a.dx, a.d_gate, a.d_skip = (None if t is None else t.data_ptr() for t in rows)
    a.d_scale, a.d_bias, a.d_skip_scale = (None if t is None else t.data_ptr() for t in shares)
    if x.numel():
        loader.call("oxl_head_norm_backward", a)
    dx, d_gate, d_skip = (_alike(t, own) for t, own in zip((x, gate, skip), rows, strict=True))
    d_scale, d_bias, d_skip_scale = (
        _alike(t, None if own is None else own.sum(0))
        for t, own in zip((scale, bias, skip_scale), shares, strict=True)
    )
    return dx, d_scale, d_bias, d_gate, d_skip, d_skip_scale


def _alike(tensor: Tensor | None, gradient: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None or gradient is None else gradient.to(tensor.dtype)


@_forward.register_fake
def _(x, scale, bias, gate, skip, skip_scale, eps, center, silu):
    return new_result(x, scale, bias, gate, skip, skip_scale)


@_backward.register_fake
def _(dy, x, scale, bias, gate, skip, skip_scale, eps, center, silu):
    tensors = (x, scale, bias, gate, skip, skip_scale)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    gradients = _backward(dy, *tensors, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, gradients, strict=True)), None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def head_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    center: bool,
    eps: float,
    gate: Tensor | None,
    silu: bool,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    widen: bool,  # it always is
) -> Tensor:
    """Arguments and result as for :func:`openxlstm.ops.head_norm`."""
    scale = weight + weight_offset if weight is not None and weight_offset else weight
    return _forward(x, scale, bias, gate, skip, skip_weight, eps, center, silu)
