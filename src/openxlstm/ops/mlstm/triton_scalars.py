"""Launches of :mod:`triton_gates`: the gate scalars of the mLSTM kernels, and the gradients of the gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openxlstm.ops.gpu import configurations
from openxlstm.ops.gpu.support import kernel

MAX_CHUNK = 1024
"""Positions one program can scan: longer chunks are cut to this."""
_OPTIONS = configurations.Tiles().options


class Scalars(NamedTuple):
    """Gate scalars as the kernels take them, (B, H, N, L) contiguous unless noted; see :class:`gates.Gates`.

    ``rows`` and ``columns`` are relative to the row where their segment of the chunk begins: smaller numbers,
    and none that depends on what lies before a cut.
    """

    rows: Tensor
    columns: Tensor
    segment: Tensor
    carry_in: Tensor
    to_state: Tensor
    keep: Tensor
    """(B, H, N)"""
    floor: Tensor
    """(B, H, T) exp(-m)"""
    m: Tensor
    """(B, H, T) float64"""


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _strides(i: Tensor, f: Tensor) -> tuple[int, ...]:
    return (*i.stride(), *f.stride())


def prepare(
    i: Tensor,  # (B, T, H)
    f: Tensor,  # (B, T, H)
    m0: Tensor,  # (B, H)
    reset: Tensor | None,  # (B, T)
    length: int,
    sigmoid: bool,
    m: Tensor | None = None,
) -> Scalars:
    """All scalars for chunks of ``length`` <= 1,024 positions; with ``m``, the stabiliser, if it is known."""
    batch, time, heads = i.shape
    chunks, pairs, known = -(-time // length), batch * heads, m is not None
    reset, m0 = _bytes(reset), m0.contiguous()
    tile = configurations.tile_of(length)
    sizes = (time, heads, length, chunks, *_strides(i, f))

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return i.new_empty((batch, heads, *shape), dtype=dtype)

    entering = None
    if chunks > 1 and not known and not sigmoid:
        decay, best, entering = (new(torch.float64, chunks) for _ in range(3))
        kernel("mlstm.triton_gates", "chunk_changes_kernel")[(pairs * chunks,)](
            i, f, reset, decay, best, *sizes, BT=tile, **_OPTIONS
        )
        kernel("mlstm.triton_gates", "entering_kernel")[(pairs,)](
            decay, best, m0, entering, chunks, BN=min(MAX_CHUNK, configurations.tile_of(chunks)), **_OPTIONS
        )
    result = Scalars(
        rows=new(torch.float64, chunks, length),
        columns=new(torch.float64, chunks, length),
        segment=new(torch.int32, chunks, length),
        carry_in=new(torch.float32, chunks, length),
        to_state=new(torch.float32, chunks, length),
        keep=new(torch.float32, chunks),
        floor=new(torch.float32, time),
        m=new(torch.float64, time) if m is None else m,
    )
    kernel("mlstm.triton_gates", "scalars_kernel")[(pairs * chunks,)](
        i, f, reset, m0, entering, result.m, *result[:-1], *sizes,
        SIGMOID=sigmoid, KNOWN=known, BT=tile, **_OPTIONS,
    )  # fmt: skip
    return result


def gradients(
    i: Tensor,  # (B, T, H)
    f: Tensor,  # (B, T, H)
    m0: Tensor,  # (B, H)
    reset: Tensor | None,  # (B, T)
    m: Tensor,  # (B, H, T) float64
    along: Tensor,  # (B, H, T): (dh . h) / den
    flow: Tensor,  # (B, H, N, tiles): parts of <C, dC> + n . dn entering each chunk
    outgoing: Tensor,  # (parts, B, H, N, L): parts of q . dq
    incoming: Tensor,  # (parts, B, H, N, L): parts of k . dk
    last_flow: Tensor,  # (B, H) float64: <C, dC> + n . dn of the last state
    dm_last: Tensor | None,  # (B, H)
    eps: float,
    *,
    sigmoid: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of i, f and of the first m, in their dtypes."""
    batch, time, heads = i.shape
    parts, *_, chunks, length = outgoing.shape
    di, df = i.new_empty(i.shape), f.new_empty(f.shape)
    dm0 = m0.new_empty(m0.shape)
    end = -last_flow if dm_last is None else dm_last.double() - last_flow
    tile = min(MAX_CHUNK, configurations.tile_of(chunks * length))
    kernel("mlstm.triton_gates", "gate_gradients_kernel")[(batch * heads,)](
        i, f, _bytes(reset), m0.contiguous(), m, outgoing, incoming, flow, last_flow, along, end, di, df, dm0,
        eps, time, heads, length, chunks, parts, flow.shape[-1], *_strides(i, f),
        SIGMOID=sigmoid, NORMALIZE=normalize, BT=tile, **_OPTIONS,
    )  # fmt: skip
    return di, df, dm0
