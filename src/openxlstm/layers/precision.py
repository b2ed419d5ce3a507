"""Casts that decide in which dtype something is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def cast_once(x: Tensor) -> Tensor:
    """Under autocast, ``x`` in the autocast dtype; otherwise ``x``.

    For an input that several linear maps read: each would cast it again and keep its own copy for the
    backward pass. The values are the same.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
