"""Dense linear maps that are fast on every CPU.

In float32 they are products of :mod:`openxlstm.ops.matmul`. On a CPU without bfloat16 units (AVX512-BF16,
AMX) PyTorch emulates bfloat16 products, a hundred times slower than float32 ones. Products of bfloat16
numbers are exact in float32, so there the operands are widened, the product runs in float32, and the result
is rounded once: the same mathematics, at float32 speed, while activations stay stored in bfloat16. Everything
else goes to PyTorch's own kernels unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from openxlstm.ops.matmul import matmul
from openxlstm.runtime import has_fast_bfloat16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, under autocast in the autocast dtype, as :func:`torch.nn.functional.linear`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or None.

    Returns:
        (..., out).
    """
    if x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    dtype = computing_dtype(x)
    if dtype == torch.bfloat16:
        return _linear_bfloat16(x.to(dtype), weight, bias)
    if dtype == weight.dtype == torch.float32 and x.shape[-1:] == weight.shape[1:]:
        y = matmul(x.reshape(-1, x.shape[-1]), weight.t(), bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    return functional.linear(x, weight, bias)


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of ``x`` run in: under autocast its dtype, otherwise that of ``x``."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to ``dtype``, in the dtype whose products of such numbers the device computes fast."""
    x = x.to(dtype)
    emulated = dtype == torch.bfloat16 and x.device.type == "cpu" and not has_fast_bfloat16("cpu")
    return x.float() if emulated else x


@torch.library.custom_op("openxlstm::linear_bfloat16", mutates_args=())
def _linear_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        b = None if bias is None else widened(bias, torch.bfloat16)
        y = functional.linear(widened(x, torch.bfloat16), widened(weight, torch.bfloat16), b)
    return y.to(torch.bfloat16)


@_linear_bfloat16.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("openxlstm::linear_bfloat16_backward", mutates_args=())
def _linear_bfloat16_backward(
    x: Tensor, weight: Tensor, dy: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widened(dy, torch.bfloat16).reshape(-1, dy.shape[-1])
    dx = (wide @ widened(weight, torch.bfloat16)).to(x.dtype).view(x.shape)
    dw = (wide.t() @ widened(x, torch.bfloat16).reshape(-1, x.shape[-1])).to(weight.dtype)
    db = wide.sum(0, dtype=torch.float32).to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx, dw, db


@_linear_bfloat16_backward.register_fake
def _(x, weight, dy, has_bias):
    db = weight.new_empty(weight.shape[0] if has_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), db


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _autograd(ctx, dy):
    dx, dw, db = _linear_bfloat16_backward(*ctx.saved_tensors, dy, ctx.has_bias)
    return dx, dw, db if ctx.has_bias else None


torch.library.register_autograd("openxlstm::linear_bfloat16", _autograd, setup_context=_setup_context)
