"""Soft capping: cap * tanh(x / cap), which keeps values in (-cap, cap) with gradient 1 around zero.

A language model's logits are its largest tensor by far, so this is written to keep one float32 copy of it:
both passes work in place on a copy, and the backward pass reads the result, dx = dy (1 - (y / cap)^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.layers.precision import at_least_float32


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = at_least_float32(x)
        y = (wide / cap if wide is x else wide.div_(cap)).tanh_().mul_(cap)
        ctx.save_for_backward(y)
        ctx.cap, ctx.dtype = cap, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated once more
            return (dy * (1 - (y / ctx.cap).square())).to(ctx.dtype), None
        return (y / ctx.cap).square_().neg_().add_(1).mul_(dy).to(ctx.dtype), None


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)`` in float32 (float64 for float64), any shape; ``cap=None`` only casts."""
    if cap is None:
        return at_least_float32(x)
    return _SoftCap.apply(x, cap)  # pyright: ignore[reportReturnType]
