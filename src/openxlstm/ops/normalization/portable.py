"""Backend ``portable`` of the head norm: PyTorch, on any device and dtype, differentiable."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What PyTorch gives the product of the given tensors."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def new_result(x: Tensor, *others: Tensor | None) -> Tensor:
    """An empty y (..., H D) in the dtype of the product of the given tensors; x is (..., H, D)."""
    return x.new_empty((*x.shape[:-2], x.shape[-2] * x.shape[-1]), dtype=result_dtype(x, *others))


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
    widen: bool,
) -> Tensor:
    """Arguments and result as for :func:`openxlstm.ops.head_norm`."""
    u = x.float() if widen and x.dtype != torch.float64 else x
    if center:
        u = F.layer_norm(u, u.shape[-1:], eps=eps)
    else:
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    y = u.flatten(-2).to(x.dtype) if widen else u.flatten(-2)
    if weight is not None:
        y = y * (weight + weight_offset if weight_offset else weight)
    if bias is not None:
        y = y + bias
    if skip is not None:
        y = y + (skip if skip_weight is None else skip_weight * skip)
    if gate is not None:
        y = y * (F.silu(gate) if silu else torch.sigmoid(gate))
    return y
