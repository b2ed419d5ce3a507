"""What the mLSTM operators check before anything runs; an error says what to give."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from openxlstm.state import mLSTMState

InputGate = Literal["exp", "sigmoid"]


def check_sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, chunk_size: int | None) -> None:
    """Check the inputs of an operator over sequences against each other."""
    if q.ndim != 4:
        raise ValueError(f"q must have shape (B, T, H, DK), got {tuple(q.shape)}")
    if q.shape[-1] < 1:
        raise ValueError(f"the query/key head dimension must be at least 1, got q of shape {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have shape (B, T, H, DV) = {(*q.shape[:3], 'DV')}, got {tuple(v.shape)}")
    for name, gate in (("i", i), ("f", f)):
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must have shape (B, T, H) = {tuple(q.shape[:3])}, got {tuple(gate.shape)}"
            )
    for name, x in (("q", q), ("k", k), ("v", v), ("i", i), ("f", f)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: move them to one device")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")


def check_options(input_gate: str, normalize: bool) -> None:
    """Check the choice of gate and normaliser."""
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"input_gate must be 'exp' or 'sigmoid', got {input_gate!r}")
    if not normalize and input_gate == "exp":
        raise ValueError(
            "normalize=False needs input_gate='sigmoid': the exponential gate is unbounded without it"
        )


def check_state(
    state: mLSTMState,
    batch: int,
    heads: int,
    qk_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check a state against the sizes of a call."""
    if len(state) != 3:
        raise ValueError(f"state must be an mLSTMState (c, n, m), got {len(state)} tensors")
    expected = {"c": (batch, heads, qk_dim, v_dim), "n": (batch, heads, qk_dim), "m": (batch, heads)}
    for (name, shape), x in zip(expected.items(), state, strict=True):
        if tuple(x.shape) != shape:
            raise ValueError(f"state.{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise ValueError(f"state.{name} must be {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"state.{name} is on {x.device}, q on {device}: move them to one device")
