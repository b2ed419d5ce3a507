"""Dense linear maps whose bfloat16 form is fast on every CPU.

On a CPU without bfloat16 units (AVX512-BF16, AMX) PyTorch emulates bfloat16 products, a hundred times slower
than float32 ones. Products of bfloat16 numbers are exact in float32, so there the operands are widened, the
product runs in float32, and the result is rounded once: the same mathematics, at float32 speed, while
activations stay stored in bfloat16. Everything else goes to PyTorch's own kernels unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype != torch.bfloat16 or x.dtype == torch.float64:
        return functional.linear(x, weight, bias)
    return _linear_bfloat16(x.to(dtype), weight, bias)


def _widened(x: Tensor) -> Tensor:
    """bfloat16 values in the dtype whose products the CPU computes fast."""
    x = x.to(torch.bfloat16)
    return x if has_fast_bfloat16("cpu") else x.float()


@torch.library.custom_op("openxlstm::linear_bfloat16", mutates_args=())
def _linear_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = functional.linear(_widened(x), _widened(weight), None if bias is None else _widened(bias))
    return y.to(torch.bfloat16)


@_linear_bfloat16.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("openxlstm::linear_bfloat16_backward", mutates_args=())
def _linear_bfloat16_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = _widened(dy).reshape(-1, dy.shape[-1])
    dx = (wide @ _widened(weight)).to(x.dtype).view(x.shape)
    dw = (wide.t() @ _widened(x).reshape(-1, x.shape[-1])).to(weight.dtype)
    return dx, dw, wide.sum(0, dtype=torch.float32).to(weight.dtype)


@_linear_bfloat16_backward.register_fake
def _(x, weight, dy):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _autograd(ctx, dy):
    dx, dw, db = _linear_bfloat16_backward(*ctx.saved_tensors, dy)
    return dx, dw, db if ctx.has_bias else None


torch.library.register_autograd("openxlstm::linear_bfloat16", _autograd, setup_context=_setup_context)
