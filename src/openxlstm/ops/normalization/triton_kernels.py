"""Triton kernel of the head norm: one program normalises one head of one row, scales, adds and gates it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["eps", "weight_offset"])
def head_norm_kernel(
    x,  # (N, H, D)
    weight, bias,  # (H * D), or None
    gate, skip,  # (N, H * D), or None
    skip_weight,  # (H * D), or None
    y,  # out: (N, H * D), contiguous
    eps, weight_offset,
    heads, d, x_n, x_h, gate_n, skip_n,
    CENTER: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = ((weight_offset + weight) * norm(x) + bias + skip_weight * skip) * act(gate), in float32."""
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // heads, pid % heads
    column = tl.arange(0, BD)
    inside = column < d
    channel = head * d + column
    u = tl.load(x + row * x_n + head * x_h + column, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        u = tl.where(inside, u - tl.sum(u, 0) / d, 0.0)
    u *= 1.0 / tl.sqrt(tl.sum(u * u, 0) / d + eps)
    if weight is not None:
        u *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) + weight_offset
    if bias is not None:
        u += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        added = tl.load(skip + row * skip_n + channel, mask=inside, other=0.0).to(tl.float32)
        if skip_weight is not None:
            added *= tl.load(skip_weight + channel, mask=inside, other=0.0).to(tl.float32)
        u += added
    if gate is not None:
        z = tl.load(gate + row * gate_n + channel, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(z))
        act = tl.where(z >= 0, 1.0, e) / (1.0 + e)
        if SILU:
            act *= z
        u *= act
    tl.store(y + row * heads * d + channel, u.to(y.dtype.element_ty), mask=inside)
