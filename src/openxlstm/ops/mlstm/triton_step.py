"""Triton kernels of the mLSTM for a few tokens: every state read once and written once, in place or not.

Decoding is bound by the bytes of C. The first kernel does what depends on gates, q, k and n alone (one small
program per head): it advances n and m and leaves the two gate factors and 1 / den of every token. The second
streams C in column slabs through registers, all tokens applied to a tile while it is there. So no program
writes what another still reads, even in place.

Rows of the batch find their state through ``slots``; a negative slot marks a row to leave alone. Gates are
float32 throughout: in bfloat16 a forget gate of 0.999 would be 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openxlstm.ops.mlstm.triton_gates import log_sigmoid


@triton.jit(do_not_specialize=["time", "scale"])
def step_scalars_kernel(
    q, k,  # (B, T, H, DK)
    i, f,  # (B, T, H)
    n_in, m_in,  # (S, H, DK), (S, H)
    n_out, m_out,  # out: like n_in, m_in, or the same memory
    slots,  # (B,) integers, or None for row b = slot b
    kept, added, inverse,  # out: (B, H, T) float32
    eps, scale,
    time, heads, dk,
    q_b, q_t, q_h, k_b, k_t, k_h, i_b, i_t, i_h, f_b, f_t, f_h,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gates, normaliser and stabiliser of one head over all tokens."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
    if slot < 0:
        return
    in_k = tl.arange(0, BK)
    inside = in_k < dk
    state = slot * heads + head
    n = tl.load(n_in + state * dk + in_k, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_in + state).to(tl.float32)
    for t in range(time):
        log_f = log_sigmoid(tl.load(f + batch * f_b + t * f_t + head * f_h).to(tl.float64)).to(tl.float32)
        log_i = tl.load(i + batch * i_b + t * i_t + head * i_h).to(tl.float32)
        if SIGMOID:
            log_i = log_sigmoid(log_i.to(tl.float64)).to(tl.float32)
            m_new = m * 0.0
            keep, add = tl.exp(log_f), tl.exp(log_i)
        else:
            m_new = tl.maximum(log_f + m, log_i)
            m_new = tl.where(m_new == float("-inf"), 0.0, m_new)
            keep, add = tl.exp(log_f + m - m_new), tl.exp(log_i - m_new)
        m = m_new
        keys = tl.load(k + batch * k_b + t * k_t + head * k_h + in_k, mask=inside, other=0.0).to(tl.float32)
        n = keep * n + add * keys
        p = m * 0.0 + 1.0
        if NORMALIZE:
            queries = tl.load(q + batch * q_b + t * q_t + head * q_h + in_k, mask=inside, other=0.0)
            r = tl.abs(tl.sum(queries.to(tl.float32) * n, 0)) * scale
            p = 1.0 / (tl.maximum(r, tl.exp(tl.minimum(-m, 88.0))) + eps)
        at = pair * time + t
        tl.store(kept + at, keep)
        tl.store(added + at, add)
        tl.store(inverse + at, p)
    tl.store(n_out + state * dk + in_k, n.to(n_out.dtype.element_ty), mask=inside)
    tl.store(m_out + state, m.to(m_out.dtype.element_ty))


@triton.jit(do_not_specialize=["time", "scale"])
def step_memory_kernel(
    q, k, v,  # (B, T, H, D)
    c_in, c_out,  # (S, H, DK, DV), the same memory or not
    slots,  # as above
    kept, added, inverse,  # (B, H, T) float32
    h,  # out: (B, T, H, DV), contiguous
    scale,
    time, heads, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """C = kept C + added k v^T and h = s C^T q / den for one slab of BV columns; T <= BT."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch).to(tl.int64)
    in_v = tl.program_id(1) * BV + tl.arange(0, BV)
    token = tl.arange(0, BT)
    to = h + (((batch * time + token) * heads + head) * dv)[:, None] + in_v[None, :]
    written = (token < time)[:, None] & (in_v < dv)[None, :]
    if slot < 0:
        tl.store(to, tl.zeros((BT, BV), h.dtype.element_ty), mask=written)
        return
    state = (slot * heads + head) * dk * dv
    num = tl.zeros((BT, BV), tl.float32)
    for k0 in range(0, dk, BK):
        in_k = k0 + tl.arange(0, BK)
        tile = state + in_k[:, None] * dv + in_v[None, :]
        inside = (in_k < dk)[:, None] & (in_v < dv)[None, :]
        c = tl.load(c_in + tile, mask=inside, other=0.0).to(tl.float32)
        for t in range(time):
            at = pair * time + t
            keys = tl.load(k + batch * k_b + t * k_t + head * k_h + in_k, mask=in_k < dk, other=0.0)
            queries = tl.load(q + batch * q_b + t * q_t + head * q_h + in_k, mask=in_k < dk, other=0.0)
            values = tl.load(v + batch * v_b + t * v_t + head * v_h + in_v, mask=in_v < dv, other=0.0)
            weighted = keys.to(tl.float32) * tl.load(added + at)
            c = tl.load(kept + at) * c + weighted[:, None] * values.to(tl.float32)[None, :]
            part = tl.sum(c * queries.to(tl.float32)[:, None], 0)
            num += tl.where((token == t)[:, None], tl.expand_dims(part, 0), 0.0)
        tl.store(c_out + tile, c.to(c_out.dtype.element_ty), mask=inside)
    p = tl.load(inverse + pair * time + token, mask=token < time, other=0.0)
    num *= tl.expand_dims(p * scale, 1)
    tl.store(to, num.to(h.dtype.element_ty), mask=written)
