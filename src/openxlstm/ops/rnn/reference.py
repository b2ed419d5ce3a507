"""Backend ``recurrent``: the definition, a loop over time that autograd differentiates.

The truth every other backend is tested against. Works in float32 and float64, on any device, and can be
differentiated any number of times. Its memory and run time grow with every elementary operation of every
step; use it to understand and to check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.rnn.cells import Cell
from openxlstm.state import map_state


def _advance(
    cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, state: Any, normalizer_floor: float | None
) -> Any:
    """``state`` after one position, x (B, G, H, D)."""
    recurrent = state.h.transpose(0, 1) @ weight.mT  # (H, B, D_in) (G_r, H, D_in, D_out)
    return cell.step(x, recurrent.permute(2, 0, 1, 3), bias, state, normalizer_floor)


def step(
    cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, state: Any, normalizer_floor: float | None
) -> Any:
    """``state`` after one position. x (B, G, H, D) of any dtype, the rest in the dtype of the computation."""
    with torch.autocast(x.device.type, enabled=False):
        return _advance(cell, x.to(weight.dtype), weight, bias, state, normalizer_floor)


def recurrent(
    cell: Cell,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Any,
    reset: Tensor | None,
    normalizer_floor: float | None,
) -> tuple[Tensor, Any]:
    """Run ``cell`` over time.

    x (B, T, G, H, D) with T >= 1, any dtype; the rest in the dtype of the computation: weight
    (G_r, H, D_out, D_in), bias (G_b, H, D), state leaves (B, H, D). reset (B, T) bool or None.
    Returns h (B, T, H, D) and the state after the last position.
    """
    outputs = []
    with torch.autocast(x.device.type, enabled=False):
        for t, x_t in enumerate(x.to(weight.dtype).unbind(1)):
            if reset is not None:
                keep = ~reset[:, t, None, None]
                state = map_state(lambda s, keep=keep: torch.where(keep, s, 0.0), state)
            state = _advance(cell, x_t, weight, bias, state, normalizer_floor)
            outputs.append(state.h)
        return torch.stack(outputs, 1), state
