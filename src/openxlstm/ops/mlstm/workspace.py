"""Per-chunk views, buffers and states of the chunkwise mLSTM."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops.mlstm.gates import Gates
from openxlstm.runtime import has_fast_bfloat16

State = tuple[Tensor, Tensor]  # (B * H, DK, DV) and (B * H, DK)


class Workspace:
    """One chunk's operands in head-first layout, and tile-sized buffers that every chunk reuses."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, c: Tensor, chunk_size: int) -> None:
        self.batch, self.time, self.heads, self.qk_dim = q.shape
        self.v_dim = v.shape[-1]
        self.chunk_size = chunk_size
        self.chunks = -(-self.time // chunk_size)
        self.dtype = c.dtype  # of states, gates and elementwise work
        native = q.dtype == torch.bfloat16 and has_fast_bfloat16(q.device)
        self.product_dtype = torch.bfloat16 if native else self.dtype
        self.scale = self.qk_dim**-0.5
        self._buffers: dict[str, Tensor] = {}
        self._device = q.device

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A reused block of memory of this shape; contents undefined."""
        size = 1
        for extent in shape:
            size *= extent
        block = self._buffers.get(name)
        if block is None or block.numel() < size:
            block = torch.empty(size, dtype=dtype or self.dtype, device=self._device)
            self._buffers[name] = block
        return block[:size].view(shape)

    def span(self, chunk: int) -> tuple[int, int]:
        """First position of a chunk and the one after its last."""
        start = chunk * self.chunk_size
        return start, min(start + self.chunk_size, self.time)

    def operand(self, name: str, x: Tensor, chunk: int) -> Tensor:
        """Chunk of x (B, T, H, D) as (B * H, L, D) in the dtype of products; a view where possible."""
        start, end = self.span(chunk)
        part = x[:, start:end].transpose(1, 2)
        if x.dtype == self.product_dtype and (self.batch == 1 or self.heads == 1):
            return part.flatten(0, 1)
        block = self.buffer(name, self.batch, self.heads, end - start, x.shape[-1], dtype=self.product_dtype)
        return block.copy_(part).flatten(0, 1)

    def scalars(self, x: Tensor, chunk: int, dtype: torch.dtype | None = None) -> Tensor:
        """Chunk of gate scalars (B, H, N, L) as (B * H, L)."""
        start, end = self.span(chunk)
        return x[:, :, chunk, : end - start].flatten(0, 1).to(dtype or self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x as an operand of a matrix product."""
        return x.to(self.product_dtype)

    def multiply(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batched a @ b, in the dtype of elementwise work, in the buffer ``name``."""
        out = self.buffer(name, a.shape[0], a.shape[1], b.shape[2])
        if self.product_dtype == self.dtype:
            return torch.bmm(a, b, out=out)
        return out.copy_(torch.bmm(a, b))

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total += a @ b in place."""
        if self.product_dtype == self.dtype:
            return total.baddbmm_(a, b)
        return total.add_(torch.bmm(a, b))

    def decay(self, gates: Gates, chunk: int) -> Tensor:
        """The tile W = exp(D) of a chunk, (B * H, L, L), zero where s > t or a cut lies between."""
        rows, columns = (self.scalars(x, chunk, x.dtype) for x in (gates.rows, gates.columns))
        segment = self.scalars(gates.segment, chunk, torch.int64)
        length = rows.shape[-1]
        shape = (self.batch * self.heads, length, length)
        exponent = self.buffer("exponent", *shape, dtype=rows.dtype)
        torch.add(rows[:, :, None], columns[:, None, :], out=exponent)
        allowed = segment[:, :, None] == segment[:, None, :]
        allowed.logical_and_(self._causal(length))
        tile = self.buffer("tile", *shape)
        tile.copy_(exponent)
        return tile.masked_fill_(allowed.logical_not_(), -torch.inf).exp_()

    def _causal(self, length: int) -> Tensor:
        block = self._buffers.get("causal")
        if block is None:
            block = torch.ones(
                self.chunk_size, self.chunk_size, dtype=torch.bool, device=self._device
            ).tril_()
            self._buffers["causal"] = block
        return block[:length, :length]

    def advance(self, gates: Gates, chunk: int, k: Tensor, v: Tensor, before: State, after: State) -> None:
        """Carry the state over a chunk, from ``before`` into ``after`` (the same memory is fine)."""
        weighted = self.buffer("weighted_k", *k.shape)
        torch.mul(k, self.scalars(gates.to_state, chunk)[..., None], out=weighted)
        keep = gates.keep[:, :, chunk].flatten().to(self.dtype)
        torch.mul(before[0], keep[:, None, None], out=after[0])
        self.accumulate(after[0], self.product(weighted).transpose(1, 2), v)
        torch.mul(before[1], keep[:, None], out=after[1]).add_(weighted.sum(1))


def _empty_like(state: State) -> State:
    c, n = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
    return c, n


class EnteringStates:
    """The state entering each chunk, for a backward that visits the chunks in reverse.

    Every second one is kept and the others are rebuilt when asked for: half the memory, for one more state
    update every second chunk.
    """

    def __init__(
        self, work: Workspace, gates: Gates, k: Tensor, v: Tensor, c0: Tensor, n0: Tensor, *, last: bool
    ) -> None:
        """Run the recurrence; with ``last`` up to the state leaving the last chunk (``work.chunks``)."""
        self._work, self._gates, self._k, self._v = work, gates, k, v
        first = c0.flatten(0, 1), n0.flatten(0, 1)
        self._kept: list[State] = [first]
        self._rebuilt = _empty_like(first)
        for chunk in range(2, work.chunks + (1 if last else 0), 2):
            self._advance(chunk - 2, self._kept[-1], self._rebuilt)
            self._kept.append(_empty_like(first))
            self._advance(chunk - 1, self._rebuilt, self._kept[-1])

    def __getitem__(self, chunk: int) -> State:
        """State entering ``chunk``; valid until the next one is asked for. Uses the operand buffers."""
        if chunk % 2:
            self._advance(chunk - 1, self._kept[chunk // 2], self._rebuilt)
            return self._rebuilt
        return self._kept[chunk // 2]

    def _advance(self, chunk: int, before: State, after: State) -> None:
        work = self._work
        ks, vs = work.operand("k", self._k, chunk), work.operand("v", self._v, chunk)
        work.advance(self._gates, chunk, ks, vs, before, after)
