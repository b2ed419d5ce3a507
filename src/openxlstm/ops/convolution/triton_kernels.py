"""Triton kernel of the causal convolution: a tile of positions and channels per program, taps unrolled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["time"])
def convolution_kernel(
    x,  # (B, T, E)
    weight, bias,  # (E, K) contiguous, (E) or None
    before,  # (B, K - 1, E)
    reset,  # (B, T) uint8 or None
    y,  # out: (B, T, E), contiguous
    time, channels, x_b, x_t, before_b, before_t,
    TAPS: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """y_t = act(bias + sum over d of weight[K - 1 - d] * x_{t-d}); taps do not reach over a cut."""
    tiles = tl.cdiv(time, BT)
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    position = (pid % tiles).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BE + tl.arange(0, BE)
    valid, inside = position < time, column < channels
    x += batch * x_b
    before += batch * before_b
    if reset is not None:
        reset += batch * time
    total = tl.zeros((BT, BE), tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    reached = valid  # whether the tap lies in the position's document
    for distance in tl.static_range(TAPS):  # pyright: ignore[reportGeneralTypeIssues]
        at = position - distance
        if reset is not None and distance > 0:
            reached = reached & (tl.load(reset + at + 1, mask=reached & (at >= -1), other=0) == 0)
        tap = tl.load(weight + column * TAPS + (TAPS - 1 - distance), mask=inside, other=0.0).to(tl.float32)
        here = (reached & (at >= 0))[:, None] & inside[None, :]
        value = tl.load(x + at[:, None] * x_t + column[None, :], mask=here, other=0.0).to(tl.float32)
        if distance > 0:
            there = (reached & (at < 0))[:, None] & inside[None, :]
            where = before + (at + (TAPS - 1))[:, None] * before_t + column[None, :]
            value += tl.load(where, mask=there, other=0.0).to(tl.float32)
        total += tap[None, :] * value
    if SILU:
        e = tl.exp(-tl.abs(total))
        total *= tl.where(total >= 0, 1.0, e) / (1.0 + e)
    to = y + (batch * time + position)[:, None] * channels + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=valid[:, None] & inside[None, :])
