"""Soft capping: cap * tanh(x / cap), which keeps values in (-cap, cap) with gradient 1 around zero."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.layers.norms import at_least_float32


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)`` in float32 (float64 for float64), any shape; ``cap=None`` only casts."""
    x = at_least_float32(x)
    return x if cap is None else cap * torch.tanh(x / cap)
