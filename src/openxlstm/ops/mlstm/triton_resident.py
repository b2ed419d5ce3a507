"""Triton kernels of the mLSTM forward schedule that keeps the state on the chip.

What needs a whole row of queries or keys does not need the matrix memory: the vectors n entering the chunks
(:func:`vectors_kernel`), then the weighted scores and the normaliser of all chunks in parallel
(:func:`scores_kernel`). What is left treats each value column alone, so programs share the columns and each
walks over the sequence with its columns of C in registers (:func:`resident_kernel`): no state traffic.
Notation, conventions and rules as in :mod:`triton_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openxlstm.ops.mlstm.triton_forward import decay_tile, existing, load_rows


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def vectors_kernel(
    k,  # (B, T, H, DK)
    to_state,  # (B * H, N, L) float32
    keep,  # (B * H, N) float32
    n0,  # (B * H, DK) float32
    n_states, n_last,  # out: entering each chunk, (B * H, N, DK), and the last one. float32
    time, heads, dk, length, chunks,
    k_b, k_t, k_h,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """n' = keep n + (a-bar K)^T 1 of BK dimensions of one head (L <= BT)."""
    pair = tl.program_id(0).to(tl.int64)
    k += pair // heads * k_b + pair % heads * k_h
    in_k, row = tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, BT)
    n = tl.load(n0 + pair * dk + in_k, mask=in_k < dk, other=0.0)
    for chunk in tl.range(chunks, num_stages=3):  # pyright: ignore[reportGeneralTypeIssues]
        at = pair * chunks + chunk
        valid = (row < length) & (chunk * length + row < time)
        loaded = existing(row, chunk, length, time)
        keys = load_rows(k + tl.cast(chunk, tl.int64) * length * k_t, loaded, k_t, in_k, dk)
        weight = tl.load(to_state + at * length + row, mask=valid, other=0.0)
        tl.store(n_states + at * dk + in_k, n, mask=in_k < dk)
        n = n * tl.load(keep + at) + tl.sum(keys.to(tl.float32) * weight[:, None], 0)
    tl.store(n_last + pair * dk + in_k, n, mask=in_k < dk)


@triton.jit(do_not_specialize=["time", "length", "chunks", "log2_scale"])
def scores_kernel(
    q, k,  # (B, T, H, DK)
    rows, columns, segment,  # (B * H, N, L) float64, float64, int32
    carry_in,  # (B * H, N, L) float32
    floor,  # (B * H, T) float32: exp(-m)
    n_states,  # (B * H, N, DK) float32
    scores_out,  # out: A, (B * H, N, BT, BT), zero beyond the chunk
    r_out, den_out,  # out: (B * H, T) float32
    eps, log2_scale,
    time, heads, dk, length, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h,
    NORMALIZE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A = s (Q K^T) * W of one chunk (L <= BT), and the normaliser of its rows."""
    at = tl.program_id(0).to(tl.int64)
    pair, chunk = at // chunks, (at % chunks).to(tl.int32)
    begin = chunk.to(tl.int64) * length
    q += pair // heads * q_b + pair % heads * q_h + begin * q_t
    k += pair // heads * k_b + pair % heads * k_h + begin * k_t
    row = tl.arange(0, BT)
    position = chunk * length + row
    valid = (row < length) & (position < time)
    loaded = existing(row, chunk, length, time)
    scores = tl.zeros((BT, BT), tl.float32)
    carried = tl.zeros((BT,), tl.float32)
    for k0 in range(0, dk, BK):
        in_k = k0 + tl.arange(0, BK)
        queries = load_rows(q, loaded, q_t, in_k, dk)
        keys = load_rows(k, loaded, k_t, in_k, dk)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        if NORMALIZE:
            n = tl.load(n_states + at * dk + in_k, mask=in_k < dk, other=0.0)
            carried += tl.sum(queries.to(tl.float32) * n[None, :], 1)
    here = at * length
    scores *= decay_tile(rows + here, columns + here, segment + here, 0, log2_scale, row, row, valid, valid)
    to = scores_out + at * (BT * BT) + (row[:, None] * BT + row[None, :])
    tl.store(to, scores.to(scores_out.dtype.element_ty))
    if NORMALIZE:
        beta = tl.load(carry_in + here + row, mask=valid, other=0.0) * tl.exp2(log2_scale)
        r = tl.sum(scores, 1) + beta * carried
        den = tl.maximum(tl.abs(r), tl.load(floor + pair * time + position, mask=valid, other=1.0)) + eps
        tl.store(r_out + pair * time + position, r, mask=valid)
        tl.store(den_out + pair * time + position, den, mask=valid)


@triton.jit(do_not_specialize=["time", "length", "chunks", "scale"])
def resident_kernel(
    q, k, v,  # (B, T, H, D)
    scores,  # (B * H, N, BT, BT)
    carry_in, to_state,  # (B * H, N, L) float32
    keep,  # (B * H, N) float32
    den,  # (B * H, T) float32
    c0,  # (B * H, DK, DV) float32
    h,  # out: (B, T, H, DV), contiguous
    c_last,  # out: (B * H, DK, DV) float32
    scale,
    time, heads, dk, dv, length, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    NORMALIZE: tl.constexpr, CARRIED: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = (A V + s beta Q C) / den and C' = keep C + K^T (a-bar V) of BV value columns of one head (DK <= BK,
    L <= BT). C is held transposed, (BV, BK), as operand and accumulator of the products alike."""
    pid_v, pair = tl.program_id(1), tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    in_k, in_v, row = tl.arange(0, BK), pid_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    tile = in_k[None, :] * dv + in_v[:, None]
    inside = (in_k < dk)[None, :] & (in_v < dv)[:, None]
    c = tl.load(c0 + pair * dk * dv + tile, mask=inside, other=0.0)
    for chunk in range(chunks):
        at = pair * chunks + chunk
        position = chunk * length + row
        valid = (row < length) & (position < time)
        loaded = existing(row, chunk, length, time)
        begin = tl.cast(chunk, tl.int64) * length
        queries = load_rows(q + begin * q_t, loaded, q_t, in_k, dk)
        num = tl.dot(c.to(CARRIED), tl.trans(queries.to(CARRIED)), input_precision=PRECISION)
        num *= (tl.load(carry_in + at * length + row, mask=valid, other=0.0) * scale)[None, :]
        values = load_rows(v + begin * v_t, loaded, v_t, in_v, dv)
        weights = tl.load(scores + at * (BT * BT) + (row[:, None] * BT + row[None, :]))
        num = tl.dot(tl.trans(values), tl.trans(weights), num, input_precision=PRECISION)
        if NORMALIZE:
            num = num / tl.load(den + pair * time + position, mask=valid, other=1.0)[None, :]
        to = h + ((batch * time + begin) * heads + head) * dv
        tl.store(
            to + row[:, None] * (heads * dv) + in_v[None, :],
            tl.trans(num.to(h.dtype.element_ty)),
            mask=valid[:, None] & (in_v < dv)[None, :],
        )
        weight = tl.load(to_state + at * length + row, mask=valid, other=0.0)
        values = load_rows(v + begin * v_t, loaded, v_t, in_v, dv)  # again: holding them spills
        weighted = (values.to(tl.float32) * weight[:, None]).to(v.dtype.element_ty)
        keys = load_rows(k + begin * k_t, loaded, k_t, in_k, dk)
        c = tl.dot(tl.trans(weighted), keys, c * tl.load(keep + at), input_precision=PRECISION)
    tl.store(c_last + pair * dk * dv + tile, c, mask=inside)
