"""Layers of the Transformer baseline: causal self-attention with rotary positions, and SwiGLU.

    q, k, v = W x;   q, k = rotate(q, position), rotate(k, position)
    y = W_out softmax(q k^T / sqrt(D) + causal mask) v             (Vaswani et al. 2017, Su et al. 2021)
    FFN:  y = W_down( SiLU(W_gate x) * W_up x )                    (Shazeer 2020)

The state is a :class:`KVCache`, which grows with the text. Rows of different lengths are aligned at their
ends: of the S cached positions of row b the last ``length[b]`` count. Positions are counted from the start of
each document, so a document in a packed row gives the numbers that it gives alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import small_init_, wang_init_
from openxlstm.layers.linear import Linear
from openxlstm.layers.precision import at_least_float32, cast_once
from openxlstm.state import KVCache


class CausalSelfAttention(nn.Module):
    """Multi-head (or grouped-query) causal attention, (B, T, E) -> (B, T, E).

    Args:
        width: E.
        num_heads: query heads; E / num_heads is the head dimension D, which must be even.
        num_kv_heads: key and value heads; must divide ``num_heads``.
        rope_theta: base of the rotary frequencies.
        num_blocks: blocks of the model, for the initial values.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, rope_theta: float, num_blocks: int
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.rope_theta, self.num_blocks = width // num_heads, rope_theta, num_blocks
        self.q = Linear(width, width, bias=False)
        self.k = Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v = Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.out_proj = Linear(width, width, bias=False)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: KVCache | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Run a sequence.

        Args:
            x: (B, T, E).
            state: what came before; None is the empty cache.
            return_state: also return the cache after the last position.
            reset: bool (B, T), True where a new document starts.

        Returns:
            y (B, T, E), or (y, state).
        """
        batch, time, _ = x.shape
        x = cast_once(x)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (u.unflatten(-1, (self.num_kv_heads, self.head_dim)) for u in (self.k(x), self.v(x)))
        before = None if state is None else state.length
        positions, start = _positions(batch, time, before, reset, x.device)
        q, k = _rotate(q, positions, self.rope_theta), _rotate(k, positions, self.rope_theta)
        mask = None
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        if state is not None or reset is not None:
            mask = _mask(k.shape[1], time, before, start)[:, None]
        y = F.scaled_dot_product_attention(
            *(u.transpose(1, 2) for u in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return (y, _cache(k, v, positions, before, reset is not None)) if return_state else y

    def step(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        return self(x, state, return_state=True)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> KVCache:
        """The empty cache: no positions."""
        weight = self.k.weight
        device = weight.device if device is None else device
        empty = torch.zeros(
            batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=weight.dtype
        )
        return KVCache(empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Small init of q, k, v, Wang init of the output map, as in the xLSTM beside it."""
        width = self.q.weight.shape[1]
        for linear in (self.q, self.k, self.v):
            small_init_(linear.weight, width, generator)
        wang_init_(self.out_proj.weight, width, self.num_blocks, generator)


def _positions(
    batch: int, time: int, before: Tensor | None, reset: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Position of each token in its document, and index in this piece where that document starts, (B, T).

    A document that started before this piece has the start ``-before``.
    """
    index = torch.arange(time, device=device).expand(batch, time)
    start = torch.zeros(batch, 1, dtype=torch.int64, device=device) if before is None else -before[:, None]
    start = start.expand(batch, time)
    if reset is not None and time:
        start = torch.where(reset, index, start).cummax(1).values
    return index - start, start


def _mask(total: int, time: int, before: Tensor | None, start: Tensor) -> Tensor:
    """bool (B, T, S): which of the ``total`` keys, the last ``time`` of them new, each query may see."""
    column = torch.arange(total, device=start.device) - (total - time)  # 0 is the first new token
    row = torch.arange(time, device=start.device)
    return (column <= row[:, None]) & (column >= start[..., None])


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x (B, T, H, D): channel pairs (d, d + D/2) turn by position / theta^(2 d / D)."""
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = positions[..., None, None] * torch.exp(-math.log(theta) * exponent)  # (B, T, 1, D/2)
    u = at_least_float32(x)
    cos, sin = angle.cos().to(u.dtype), angle.sin().to(u.dtype)
    a, b = u[..., :half], u[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _cache(k: Tensor, v: Tensor, positions: Tensor, before: Tensor | None, documents: bool) -> KVCache:
    """The cache after this piece: only the running document of each row, no more columns than the longest."""
    if positions.shape[1]:
        length = positions[:, -1] + 1
    else:
        length = torch.zeros_like(positions.sum(1)) if before is None else before
    if documents and length.numel():
        keep = int(length.max())
        k, v = (u[:, u.shape[1] - keep :] for u in (k, v))
        alive = torch.arange(keep, device=k.device) >= keep - length[:, None]
        k, v = (torch.where(alive[..., None, None], u, 0) for u in (k, v))
    return KVCache(k, v, length)


class SwiGLU(nn.Module):
    """y = W_down( SiLU(W_gate x) * W_up x ), (B, T, E) -> (B, T, E)."""

    def __init__(self, width: int, hidden: int, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.proj_up_gate = Linear(width, hidden, bias=False)
        self.proj_up = Linear(width, hidden, bias=False)
        self.proj_down = Linear(hidden, width, bias=False)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = cast_once(x)
        return self.proj_down(F.silu(self.proj_up_gate(x)) * self.proj_up(x))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Small init up, Wang init down."""
        width = self.proj_up.weight.shape[1]
        for linear in (self.proj_up_gate, self.proj_up):
            small_init_(linear.weight, width, generator)
        wang_init_(self.proj_down.weight, width, self.num_blocks, generator)
