"""Backend ``triton`` of the head norm: one launch for norm, scale, skip path and gate. No gradient; the
backend ``portable`` has one."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.gpu import configurations, support
from openxlstm.ops.gpu.support import kernel, unit_stride
from openxlstm.ops.normalization.portable import new_result

MAX_WIDTH = 16384
"""Channels of a head that one program holds."""


def refuse(request: Request) -> str | None:
    """Why the kernel cannot serve a request, or None."""
    if request.options.get("needs_grad"):
        return "has no backward pass"
    if request.options.get("head_dim", 1) > MAX_WIDTH:
        return f"normalises up to {MAX_WIDTH} channels at once, got {request.options['head_dim']}"
    return support.refuse(Request(request.device, request.dtype))


@torch.library.custom_op("openxlstm::head_norm_triton", mutates_args=())
def _head_norm(
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
) -> Tensor:
    y = new_result(x, weight, bias, gate, skip, skip_weight)
    if y.numel() == 0:
        return y
    heads, d = x.shape[-2:]
    rows = y.numel() // (heads * d)
    x = unit_stride(x.reshape(rows, heads, d))
    gate, skip = (None if t is None else unit_stride(t.reshape(rows, heads * d)) for t in (gate, skip))
    vectors = [None if t is None else t.contiguous() for t in (weight, bias, skip_weight)]
    width = configurations.power_of_two(d)
    options = configurations.Tiles(warps=max(1, min(16, width // 256))).options
    kernel("normalization.triton_kernels", "head_norm_kernel")[(rows * heads,)](
        x, *vectors[:2], gate, skip, vectors[2], y, eps, weight_offset, heads, d, *x.stride()[:2],
        0 if gate is None else gate.stride(0), 0 if skip is None else skip.stride(0),
        CENTER=center, SILU=silu, BD=width, **options,
    )  # fmt: skip
    return y


@_head_norm.register_fake
def _(x, weight, bias, weight_offset, center, eps, gate, silu, skip, skip_weight):
    return new_result(x, weight, bias, gate, skip, skip_weight)


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
    return _head_norm(x, weight, bias, weight_offset, center, eps, gate, silu, skip, skip_weight)
