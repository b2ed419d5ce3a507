"""Casts that decide in which dtype something is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops.dense import computing_dtype


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def cast_once(x: Tensor) -> Tensor:
    """``x`` in its :func:`computing_dtype`, for an input that several linear maps read.

    Under autocast each of them would cast it again and keep its own copy for the backward pass. The values
    are the same.
    """
    return x.to(computing_dtype(x))
