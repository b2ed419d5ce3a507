"""Launches of the mLSTM forward pass: states between chunks, then all chunks; or the state on the chip.

:func:`configurations.resident` says which of the two; docs/kernels.md why. Tensors as in
:mod:`openxlstm.ops.mlstm.triton_backend`, gate scalars as in :mod:`triton_scalars`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openxlstm.ops.gpu import configurations
from openxlstm.ops.gpu.support import carried_dtype, kernel, precision, triton_type
from openxlstm.ops.mlstm.triton_scalars import Scalars


def strides(*tensors: Tensor) -> list[int]:
    """Of all dimensions but the last."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def states_between(
    k: Tensor, v: Tensor, scalars: Scalars, c0: Tensor, n0: Tensor, chunk_size: int, *, last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state entering each chunk, (B * H, N, DK, DV) and (B * H, N, DK), and the last one."""
    batch, time, heads, dk = k.shape
    dv, pairs = v.shape[-1], batch * heads
    chunks = scalars.keep.shape[-1]
    c_states = k.new_empty((pairs, chunks, dk, dv), dtype=carried_dtype(k.dtype))
    n_states = k.new_empty((pairs, chunks, dk), dtype=torch.float32)
    c_last, n_last = (x.new_empty(x.shape) if last else x for x in (c0, n0))
    tiles = configurations.mlstm(k.device, k.dtype).states.cut(chunk_size, dk, dv)
    kernel("mlstm.triton_forward", "states_kernel")[(pairs, -(-dk // tiles.k), -(-dv // tiles.v))](
        k, v, scalars.to_state, scalars.keep, c0, n0, c_states, n_states, c_last, n_last,
        time, heads, dk, dv, chunk_size, chunks, *strides(k, v),
        STORE_LAST=last, BT=tiles.time, BK=tiles.k, BV=tiles.v, PRECISION=precision(k.dtype),
        **tiles.options,
    )  # fmt: skip
    return c_states, n_states, c_last, n_last


def outputs(
    inputs: tuple[Tensor, ...],
    scalars: Scalars,
    states: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    length: int,
    normalize: bool,
    eps: float,
) -> None:
    """Fill h, r and den from the states entering the chunks, all chunks in parallel."""
    q, k, v = inputs
    batch, time, heads, dk = q.shape
    dv, chunks = v.shape[-1], scalars.keep.shape[-1]
    tiles = configurations.mlstm(q.device, q.dtype).output.cut(length, dk, dv)
    grid = (-(-dv // tiles.v) * -(-length // tiles.rows) * batch * heads * chunks,)
    kernel("mlstm.triton_forward", "output_kernel")[grid](
        q, k, v, scalars.rows, scalars.columns, scalars.segment, scalars.carry_in, scalars.floor,
        *states, *outputs, eps, -0.5 * math.log2(dk),
        time, heads, dk, dv, length, chunks, *strides(q, k, v),
        NORMALIZE=normalize, BQ=tiles.rows, BT=tiles.time, BK=tiles.k, BV=tiles.v,
        PRECISION=precision(q.dtype), **tiles.options,
    )  # fmt: skip


def resident(
    inputs: tuple[Tensor, ...],
    scalars: Scalars,
    first: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    config: configurations.MLSTM,
    length: int,
    normalize: bool,
    eps: float,
) -> None:
    """Fill h, r, den and the last c, n, with the state on the chip throughout."""
    q, k, v = inputs
    h, r, den, c_last, n_last = outputs
    batch, time, heads, dk = q.shape
    dv, pairs, chunks = v.shape[-1], batch * heads, scalars.keep.shape[-1]
    numbers = precision(q.dtype)
    n_states = r.new_empty((pairs, chunks, dk))
    tiles = config.scores.cut(length, dk, dv)
    kernel("mlstm.triton_resident", "vectors_kernel")[(pairs, -(-dk // tiles.k))](
        k, scalars.to_state, scalars.keep, first[1], n_states, n_last, time, heads, dk, length, chunks,
        *strides(k), BT=tiles.time, BK=tiles.k, **configurations.Tiles().options,
    )  # fmt: skip
    scores = v.new_empty((pairs, chunks, tiles.time, tiles.time))
    kernel("mlstm.triton_resident", "scores_kernel")[(pairs * chunks,)](
        q, k, scalars.rows, scalars.columns, scalars.segment, scalars.carry_in, scalars.floor, n_states,
        scores, r, den, eps, -0.5 * math.log2(dk), time, heads, dk, length, chunks, *strides(q, k),
        NORMALIZE=normalize, BT=tiles.time, BK=tiles.k, PRECISION=numbers, **tiles.options,
    )  # fmt: skip
    tiles = config.resident.cut(length, dk, dv)
    kernel("mlstm.triton_resident", "resident_kernel")[(pairs, -(-dv // tiles.v))](
        q, k, v, scores, scalars.carry_in, scalars.to_state, scalars.keep, den, first[0], h, c_last, dk**-0.5,
        time, heads, dk, dv, length, chunks, *strides(q, k, v),
        NORMALIZE=normalize, CARRIED=triton_type(carried_dtype(q.dtype)), BT=tiles.time, BK=tiles.k,
        BV=tiles.v, PRECISION=numbers, **tiles.options,
    )  # fmt: skip
