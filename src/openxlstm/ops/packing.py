"""Several documents in one row: the forms a boundary can take and the conversions between them.

* ``reset`` (B, T) bool: True where a position starts a document from the empty state. Static shapes.
* ``document_ids`` (B, T): equal within a document, different in neighbouring ones.
* ``cu_seqlens`` (N + 1,): offsets of N documents laid end to end in a row of batch 1 (FlashAttention's
  convention); document n is ``[cu_seqlens[n], cu_seqlens[n + 1])`` and may be empty.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reset_from_document_ids(document_ids: Tensor) -> Tensor:
    """Boundaries from document numbers (B, T): True wherever the number changes.

    The first position of a row is False, so that a state passed in continues its document.
    """
    reset = torch.zeros_like(document_ids, dtype=torch.bool)
    reset[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return reset


def reset_from_cu_seqlens(cu_seqlens: Tensor, time: int) -> Tensor:
    """Boundaries (1, T) from document offsets (N + 1,): True at the first position of every document."""
    reset = torch.zeros(time + 1, dtype=torch.bool, device=cu_seqlens.device)
    reset[cu_seqlens.long()] = True
    return reset[None, :time]


def check_boundaries(cu_seqlens: Tensor | None, reset: Tensor | None, x: Tensor) -> None:
    """Check the boundary arguments of an operator against its input x (B, T, ...).

    Raises:
        ValueError: both forms given, a wrong shape or dtype, or offsets that do not rise from 0 to ``time``.
    """
    batch, time = x.shape[:2]
    if cu_seqlens is not None and reset is not None:
        raise ValueError("give document boundaries once: either cu_seqlens or reset, not both")
    if reset is not None and (reset.dtype != torch.bool or tuple(reset.shape) != (batch, time)):
        raise ValueError(
            f"reset must be bool of shape (B, T) = {(batch, time)}, got {reset.dtype} {tuple(reset.shape)}"
        )
    if reset is not None and reset.device != x.device:
        raise ValueError(f"reset is on {reset.device}, the input on {x.device}: move them to one device")
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1 (documents laid end to end), got {batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 offsets of shape (N + 1,), got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != time or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {time}, got {offsets[:8]}...")


def length_groups(cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Group documents of similar length, so that padding them to rows costs less than twice their tokens.

    Args:
        cu_seqlens: (N + 1,) offsets.

    Returns:
        For each group ``(documents, positions, valid)``: document numbers (M,), positions in the packed row
        (M, T_group), and whether each is a real token (M, T_group; padded positions point at 0). Every
        document, empty ones too, is in exactly one group.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = cu_seqlens[:-1].long()
    classes = torch.where(lengths > 0, torch.log2(lengths.clamp_min(1).double()).floor().long() + 1, 0)
    groups = []
    for c in classes.unique().tolist():
        documents = torch.nonzero(classes == c).flatten()
        longest = int(lengths[documents].max())
        offset = torch.arange(longest, device=cu_seqlens.device)
        valid = offset < lengths[documents, None]
        positions = torch.where(valid, starts[documents, None] + offset, 0)
        groups.append((documents, positions, valid))
    return groups
