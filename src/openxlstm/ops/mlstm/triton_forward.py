"""Triton kernels of the mLSTM forward pass: states between chunks, then all chunks in parallel.

The other schedule, with the state on the chip, is :mod:`triton_resident`.

Notation as in :mod:`openxlstm.ops.mlstm.chunkwise`; derivation and cost model in docs/kernels.md. Gate
scalars come prepared (:mod:`gates`), chunked (B * H, N, L), so no product is ever rescaled. The exponent
D_ts = rows_t + columns_s is the difference of large sums: both are float64, and each tile takes its first
row as reference, so that float32 exponents are small where weights are not. Nothing before a cut enters the
reference of what follows.

Rules of the house: pointers with masks, no block pointers; what is loaded is widened to float32 before any
arithmetic; only operands of ``tl.dot`` stay narrow.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(pointer, row, stride, columns, extent):
    """A tile x[row, columns], zero where a column is not below ``extent``.

    Every row must exist: callers repeat the last one where a tile goes beyond (:func:`existing`) and give the
    repetition no weight. A mask of rows would cost more registers than there are. Offsets in a tile are 32
    bits wide, which halves the registers that hold them: callers advance the pointer to the chunk.
    """
    where = row[:, None] * stride + columns[None, :]
    return tl.load(pointer + where, mask=(columns < extent)[None, :], other=0.0)


@triton.jit
def existing(row, chunk, length, time):
    """The row of a chunk, or its last one where there is no such row."""
    return tl.minimum(row, tl.minimum(length, time - chunk * length) - 1)


@triton.jit
def decay_tile(rows, columns, segment, first, log2_scale, row, column, row_valid, column_valid):
    """scale * exp(D) of a tile, zero where the column is later or lies behind a boundary.

    ``rows``, ``columns`` and ``segment`` point at the chunk's scalars. Exponents of the segment that holds
    the tile's ``first`` row are taken relative to that row; other segments begin inside the tile.
    """
    reference, here = tl.load(rows + first), tl.load(segment + first)
    row_segment = tl.load(segment + row, mask=row_valid, other=-1)
    column_segment = tl.load(segment + column, mask=column_valid, other=-2)
    r = tl.load(rows + row, mask=row_valid, other=0.0)
    r = (r - tl.where(row_segment == here, reference, 0.0)).to(tl.float32) * LOG2E + log2_scale
    c = tl.load(columns + column, mask=column_valid, other=float("-inf"))
    c = (c + tl.where(column_segment == here, reference, 0.0)).to(tl.float32) * LOG2E
    allowed = (row_segment[:, None] == column_segment[None, :]) & (row[:, None] >= column[None, :])
    return tl.exp2(tl.where(allowed, r[:, None] + c[None, :], float("-inf")))


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def states_kernel(
    k, v,  # (B, T, H, D)
    to_state,  # (B * H, N, L) float32
    keep,  # (B * H, N) float32
    c0, n0,  # (B * H, DK, DV), (B * H, DK) float32
    c_states, n_states,  # out: the state entering each chunk, (B * H, N, DK, DV) and (B * H, N, DK)
    c_last, n_last,  # out: (B * H, DK, DV), (B * H, DK) float32
    time, heads, dk, dv, length, chunks,
    k_b, k_t, k_h, v_b, v_t, v_h,
    STORE_LAST: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C' = keep C + (a-bar K)^T V and n' = keep n + (a-bar K)^T 1, one (BK, BV) tile of C per program."""
    pid_k, pid_v, pair = tl.program_id(1), tl.program_id(2), tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    in_k, in_v = pid_k * BK + tl.arange(0, BK), pid_v * BV + tl.arange(0, BV)
    tile = in_k[:, None] * dv + in_v[None, :]
    inside = (in_k < dk)[:, None] & (in_v < dv)[None, :]
    c = tl.load(c0 + pair * dk * dv + tile, mask=inside, other=0.0)
    n = tl.load(n0 + pair * dk + in_k, mask=in_k < dk, other=0.0)
    for chunk in range(chunks):
        at = pair * chunks + chunk
        tl.store(c_states + at * dk * dv + tile, c.to(c_states.dtype.element_ty), mask=inside)
        if pid_v == 0:
            tl.store(n_states + at * dk + in_k, n, mask=in_k < dk)
        decay = tl.load(keep + at)
        c *= decay
        n *= decay
        begin = tl.cast(chunk, tl.int64) * length
        for start in range(0, length, BT):
            here = start + tl.arange(0, BT)
            position = chunk * length + here
            valid = (here < length) & (position < time)
            weight = tl.load(to_state + at * length + here, mask=valid, other=0.0)
            loaded = existing(here, chunk, length, time)
            weighted = load_rows(k + begin * k_t, loaded, k_t, in_k, dk)
            weighted = weighted.to(tl.float32) * weight[:, None]
            values = load_rows(v + begin * v_t, loaded, v_t, in_v, dv)
            c = tl.dot(tl.trans(weighted.to(values.dtype)), values, c, input_precision=PRECISION)
            n += tl.sum(weighted, 0)
    if STORE_LAST:
        tl.store(c_last + pair * dk * dv + tile, c, mask=inside)
        if pid_v == 0:
            tl.store(n_last + pair * dk + in_k, n, mask=in_k < dk)


@triton.jit(do_not_specialize=["time", "length", "chunks", "log2_scale"])
def output_kernel(
    q, k, v,  # (B, T, H, D)
    rows, columns, segment,  # (B * H, N, L) float64, float64, int32
    carry_in,  # (B * H, N, L) float32
    floor,  # (B * H, T) float32: exp(-m)
    c_states, n_states,  # (B * H, N, DK, DV), (B * H, N, DK)
    h,  # out: (B, T, H, DV), contiguous
    r_out, den_out,  # out: (B * H, T) float32
    eps, log2_scale,
    time, heads, dk, dv, length, chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    NORMALIZE: tl.constexpr,
    BQ: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of one tile of rows and value columns: (s beta Q C + A V) / den, tile by tile of columns."""
    tiles_v, tiles_q = tl.cdiv(dv, BV), tl.cdiv(length, BQ)
    pid = tl.program_id(0)
    pid_v, pid_q = pid % tiles_v, (pid // tiles_v) % tiles_q
    at = (pid // (tiles_v * tiles_q)).to(tl.int64)
    pair, chunk = at // chunks, (at % chunks).to(tl.int32)
    batch, head = pair // heads, pair % heads
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    begin = chunk.to(tl.int64) * length
    q += begin * q_t
    k += begin * k_t
    v += begin * v_t
    first = pid_q * BQ
    row = first + tl.arange(0, BQ)
    position = chunk * length + row
    valid = (row < length) & (position < time)
    in_v = pid_v * BV + tl.arange(0, BV)
    rows += at * length
    columns += at * length
    segment += at * length

    loaded = existing(row, chunk, length, time)
    num = tl.zeros((BQ, BV), tl.float32)
    r = tl.zeros((BQ,), tl.float32)
    for k0 in range(0, dk, BK):
        in_k = k0 + tl.arange(0, BK)
        queries = load_rows(q, loaded, q_t, in_k, dk)
        c = load_rows(c_states + at * dk * dv, tl.minimum(in_k, dk - 1), dv, in_v, dv)
        num = tl.dot(queries.to(c.dtype), c, num, input_precision=PRECISION)
        if NORMALIZE:
            n = tl.load(n_states + at * dk + in_k, mask=in_k < dk, other=0.0)
            r += tl.sum(queries.to(tl.float32) * n[None, :], 1)
    beta = tl.load(carry_in + at * length + row, mask=valid, other=0.0) * tl.exp2(log2_scale)
    num *= beta[:, None]
    r *= beta
    for start in range(0, min(first + BQ, length), BT):
        column = start + tl.arange(0, BT)
        column_valid = (column < length) & (chunk * length + column < time)
        column_loaded = existing(column, chunk, length, time)
        scores = tl.zeros((BQ, BT), tl.float32)
        for k0 in range(0, dk, BK):
            in_k = k0 + tl.arange(0, BK)
            queries = load_rows(q, loaded, q_t, in_k, dk)
            keys = load_rows(k, column_loaded, k_t, in_k, dk)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        scores *= decay_tile(rows, columns, segment, first, log2_scale, row, column, valid, column_valid)
        r += tl.sum(scores, 1)
        values = load_rows(v, column_loaded, v_t, in_v, dv)
        num = tl.dot(scores.to(values.dtype), values, num, input_precision=PRECISION)

    if NORMALIZE:
        low = tl.load(floor + pair * time + position, mask=valid, other=1.0)
        den = tl.maximum(tl.abs(r), low) + eps
        num = num / den[:, None]
        if pid_v == 0:
            tl.store(r_out + pair * time + position, r, mask=valid)
            tl.store(den_out + pair * time + position, den, mask=valid)
    h += ((batch * time + begin) * heads + head) * dv
    tl.store(
        h + row[:, None] * (heads * dv) + in_v[None, :],
        num.to(h.dtype.element_ty),
        mask=valid[:, None] & (in_v < dv)[None, :],
    )
