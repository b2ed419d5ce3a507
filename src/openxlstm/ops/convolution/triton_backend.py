"""Backend ``triton`` of the causal convolution: one launch with bias and SiLU, float32 arithmetic.

No gradient; the backend ``portable`` has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.gpu import configurations, support
from openxlstm.ops.gpu.support import kernel, unit_stride

MAX_TAPS = 32
"""Taps that the kernel unrolls."""


def refuse(request: Request) -> str | None:
    """Why the kernel cannot serve a request, or None."""
    if request.options.get("needs_grad"):
        return "has no backward pass"
    if request.options.get("taps", 1) > MAX_TAPS:
        return f"takes up to {MAX_TAPS} taps, got {request.options['taps']}"
    return support.refuse(request)


@torch.library.custom_op("openxlstm::causal_convolution_triton", mutates_args=())
def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    batch, time, channels = x.shape
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    x, before = unit_stride(x), unit_stride(before)
    rows, columns = min(16, configurations.power_of_two(time)), min(128, configurations.tile_of(channels))
    grid = (batch * -(-time // rows), -(-channels // columns))
    kernel("convolution.triton_kernels", "convolution_kernel")[grid](
        x, weight.contiguous(), None if bias is None else bias.contiguous(), before,
        None if reset is None else reset.contiguous().view(torch.uint8), y,
        time, channels, *x.stride()[:2], *before.stride()[:2],
        TAPS=weight.shape[1], SILU=silu, BT=rows, BE=columns, **configurations.Tiles().options,
    )  # fmt: skip
    return y


@_convolve.register_fake
def _(x, weight, bias, before, reset, silu):
    return x.new_empty(x.shape)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    """The convolution; arguments as for :func:`openxlstm.ops.convolution.portable.convolve`."""
    return _convolve(x, weight, bias, before, reset, silu)
