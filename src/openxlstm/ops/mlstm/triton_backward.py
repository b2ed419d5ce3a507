"""Triton kernels of the mLSTM backward pass: exact gradients, score tiles shared by dQ, dK and dV.

With p_t = 1 / den_t, W' = s W p and delta_t = sign(r_t) (dh_t . h_t) where |r_t| > exp(-m_t), else 0 (so that
y = p dh and rho = -p delta of :mod:`openxlstm.ops.mlstm.chunkwise`):

    dS = W' * (dh V^T - delta)              A' = (Q K^T) * W'
    dQ = dS K + s beta p (dh C^T - delta n)
    dK = dS^T Q + a-bar (V dC'^T + dn')
    dV = A'^T dh + (a-bar K) dC'
    dC = keep dC' + (s beta p Q)^T dh       dn = keep dn' - (s beta p Q)^T delta

Dividing by den inside W' and not in dh keeps every operand of the size of the weights it belongs to: den
alone may be as small as exp(-m). The rules of :mod:`triton_forward` hold here too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from openxlstm.ops.mlstm.triton_forward import decay_tile, existing, load_rows


@triton.jit(do_not_specialize=["time"])
def rows_kernel(
    h, dh,  # (B, T, H, DV): contiguous, strided
    r, den, floor,  # (B * H, T) float32
    inverse, delta, along,  # out: (B * H, T) float32: 1 / den, delta, (dh . h) / den
    time, heads, dv, d_b, d_t, d_h,
    BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the gradient of the normaliser needs of every row."""
    tiles = tl.cdiv(time, BT)
    pid = tl.program_id(0)
    pair = (pid // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, BT)
    position = (pid % tiles) * BT + row
    valid = position < time
    begin = (pid % tiles).to(tl.int64) * BT
    h += ((batch * time + begin) * heads + head) * dv
    dh += batch * d_b + begin * d_t + head * d_h
    loaded = tl.minimum(row, time - (pid % tiles) * BT - 1)
    total = tl.zeros((BT,), tl.float32)
    for v0 in range(0, dv, BV):
        in_v = v0 + tl.arange(0, BV)
        a = load_rows(h, loaded, heads * dv, in_v, dv)
        b = load_rows(dh, loaded, d_t, in_v, dv)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    at = pair * time + position
    value = tl.load(r + at, mask=valid, other=0.0)
    inside = tl.abs(value) > tl.load(floor + at, mask=valid, other=1.0)
    p = 1.0 / tl.load(den + at, mask=valid, other=1.0)
    tl.store(inverse + at, p, mask=valid)
    tl.store(delta + at, tl.where(inside, tl.where(value < 0, -total, total), 0.0), mask=valid)
    tl.store(along + at, total * p, mask=valid)


@triton.jit(do_not_specialize=["time", "length", "chunks", "scale"])
def state_gradients_kernel(
    q, dh,  # (B, T, H, D)
    carry_in,  # (B * H, N, L) float32
    keep,  # (B * H, N) float32
    inverse, delta,  # (B * H, T) float32
    c_states, n_states,  # entering each chunk, (B * H, N, DK, DV), (B * H, N, DK)
    dc, dn,  # gradient of the last state; out: of the first. float32 (B * H, DK, DV), (B * H, DK)
    dc_states, dn_states,  # out: gradient of the state leaving each chunk
    flow,  # out: (B * H, N, tiles of K, tiles of V) float32: parts of <C, dC> + n . dn entering each chunk
    scale,
    time, heads, dk, dv, length, chunks,
    q_b, q_t, q_h, d_b, d_t, d_h,
    NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC = keep dC' + (s beta p Q)^T dh, from the last chunk to the first, one (BK, BV) tile per program."""
    pid_k, pid_v, pair = tl.program_id(1), tl.program_id(2), tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    q += batch * q_b + head * q_h
    dh += batch * d_b + head * d_h
    in_k, in_v = pid_k * BK + tl.arange(0, BK), pid_v * BV + tl.arange(0, BV)
    tile = in_k[:, None] * dv + in_v[None, :]
    inside = (in_k < dk)[:, None] & (in_v < dv)[None, :]
    grad = tl.load(dc + pair * dk * dv + tile, mask=inside, other=0.0)
    grad_n = tl.load(dn + pair * dk + in_k, mask=in_k < dk, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        at = pair * chunks + chunk
        tl.store(dc_states + at * dk * dv + tile, grad.to(dc_states.dtype.element_ty), mask=inside)
        if pid_v == 0:
            tl.store(dn_states + at * dk + in_k, grad_n, mask=in_k < dk)
        decay = tl.load(keep + at)
        grad *= decay
        grad_n *= decay
        begin = tl.cast(chunk, tl.int64) * length
        for start in range(0, length, BT):
            here = start + tl.arange(0, BT)
            position = chunk * length + here
            valid = (here < length) & (position < time)
            weight = tl.load(carry_in + at * length + here, mask=valid, other=0.0) * scale
            weight *= tl.load(inverse + pair * time + position, mask=valid, other=0.0)
            loaded = existing(here, chunk, length, time)
            weighted = load_rows(q + begin * q_t, loaded, q_t, in_k, dk)
            weighted = weighted.to(tl.float32) * weight[:, None]
            outer = load_rows(dh + begin * d_t, loaded, d_t, in_v, dv).to(c_states.dtype.element_ty)
            grad = tl.dot(tl.trans(weighted.to(outer.dtype)), outer, grad, input_precision=PRECISION)
            if NORMALIZE:
                error = tl.load(delta + pair * time + position, mask=valid, other=0.0)
                grad_n -= tl.sum(weighted * error[:, None], 0)
        c = tl.load(c_states + at * dk * dv + tile, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tl.sum(c * grad, 1), 0)
        if pid_v == 0:
            n = tl.load(n_states + at * dk + in_k, mask=in_k < dk, other=0.0)
            total += tl.sum(n * grad_n, 0)
        tl.store(flow + (at * tl.num_programs(1) + pid_k) * tl.num_programs(2) + pid_v, total)
    # every program reads and writes only its own tile, so the first gradient may take the last one's place
    tl.store(dc + pair * dk * dv + tile, grad, mask=inside)
    if pid_v == 0:
        tl.store(dn + pair * dk + in_k, grad_n, mask=in_k < dk)


@triton.jit(do_not_specialize=["time", "length", "chunks", "log2_scale"])
def inputs_kernel(
    q, k, v, dh,  # (B, T, H, D)
    rows, columns, segment,  # (B * H, N, L) float64, float64, int32
    carry_in, to_state,  # (B * H, N, L) float32
    inverse, delta,  # (B * H, T) float32
    c_states, n_states,  # entering each chunk
    dc_states, dn_states,  # gradient of the state leaving each chunk
    dq, dk_out, dv_out,  # out: (B, T, H, D), contiguous
    outgoing, incoming,  # out: (parts, B * H, N, L) float32: q . dq and k . dk of the part's columns
    log2_scale,
    time, heads, dk, dv, length, chunks, parts,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h,
    NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one chunk (L <= BT) from one pair of tiles (Q K^T, dh V^T); ``parts`` programs share
    the head dimensions of a chunk, each with the tiles in its registers."""
    pid = tl.program_id(0)
    part = pid % parts
    at = (pid // parts).to(tl.int64)
    pair, chunk = at // chunks, (at % chunks).to(tl.int32)
    batch, head = pair // heads, pair % heads
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    dh += batch * d_b + head * d_h
    begin = chunk.to(tl.int64) * length
    q += begin * q_t
    k += begin * k_t
    v += begin * v_t
    dh += begin * d_t
    carried_type = c_states.dtype.element_ty
    row = tl.arange(0, BT)
    position = chunk * length + row
    valid = (row < length) & (position < time)
    loaded = existing(row, chunk, length, time)

    scores = tl.zeros((BT, BT), tl.float32)
    for k0 in range(0, dk, BK):
        in_k = k0 + tl.arange(0, BK)
        queries = load_rows(q, loaded, q_t, in_k, dk)
        keys = load_rows(k, loaded, k_t, in_k, dk)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    d_scores = tl.zeros((BT, BT), tl.float32)
    for v0 in range(0, dv, BV):
        in_v = v0 + tl.arange(0, BV)
        grads = load_rows(dh, loaded, d_t, in_v, dv)
        values = load_rows(v, loaded, v_t, in_v, dv)
        d_scores = tl.dot(grads, tl.trans(values), d_scores, input_precision=PRECISION)

    here = at * length
    weights = decay_tile(rows + here, columns + here, segment + here, 0, log2_scale, row, row, valid, valid)
    p = tl.load(inverse + pair * time + position, mask=valid, other=0.0)
    weights *= p[:, None]
    error = tl.zeros((BT,), tl.float32)
    if NORMALIZE:
        error += tl.load(delta + pair * time + position, mask=valid, other=0.0)
    d_scores = ((d_scores - error[:, None]) * weights).to(carried_type)
    scores = (scores * weights).to(v.dtype.element_ty)
    beta = tl.load(carry_in + at * length + row, mask=valid, other=0.0) * tl.exp2(log2_scale) * p
    alpha = tl.load(to_state + at * length + row, mask=valid, other=0.0)
    to = (batch * time + begin) * heads + head
    dq += to * dk
    dk_out += to * dk
    dv_out += to * dv

    out = tl.zeros((BT,), tl.float32)
    into = tl.zeros((BT,), tl.float32)
    for k0 in range(part * BK, dk, parts * BK):
        in_k = k0 + tl.arange(0, BK)
        there = row[:, None] * (heads * dk) + in_k[None, :]
        inside = valid[:, None] & (in_k < dk)[None, :]
        carried = tl.zeros((BT, BK), tl.float32)
        for v0 in range(0, dv, BV):
            in_v = v0 + tl.arange(0, BV)
            c = load_rows(c_states + at * dk * dv, tl.minimum(in_k, dk - 1), dv, in_v, dv)
            grads = load_rows(dh, loaded, d_t, in_v, dv).to(carried_type)
            carried = tl.dot(grads, tl.trans(c), carried, input_precision=PRECISION)
        if NORMALIZE:
            n = tl.load(n_states + at * dk + in_k, mask=in_k < dk, other=0.0)
            carried -= error[:, None] * n[None, :]
        carried *= beta[:, None]
        queries = load_rows(q, loaded, q_t, in_k, dk)
        keys = load_rows(k, loaded, k_t, in_k, dk)
        carried = tl.dot(d_scores, keys.to(carried_type), carried, input_precision=PRECISION)
        out += tl.sum(carried * queries.to(tl.float32), 1)
        tl.store(dq + there, carried.to(dq.dtype.element_ty), mask=inside)
        carried = tl.zeros((BT, BK), tl.float32)
        for v0 in range(0, dv, BV):
            in_v = v0 + tl.arange(0, BV)
            dc = load_rows(dc_states + at * dk * dv, tl.minimum(in_k, dk - 1), dv, in_v, dv)
            values = load_rows(v, loaded, v_t, in_v, dv).to(carried_type)
            carried = tl.dot(values, tl.trans(dc), carried, input_precision=PRECISION)
        dn = tl.load(dn_states + at * dk + in_k, mask=in_k < dk, other=0.0)
        carried = (carried + dn[None, :]) * alpha[:, None]
        queries = load_rows(q, loaded, q_t, in_k, dk)
        keys = load_rows(k, loaded, k_t, in_k, dk)
        carried = tl.dot(tl.trans(d_scores), queries.to(carried_type), carried, input_precision=PRECISION)
        into += tl.sum(carried * keys.to(tl.float32), 1)
        tl.store(dk_out + there, carried.to(dk_out.dtype.element_ty), mask=inside)
    side = (part * (tl.num_programs(0) // parts) + at) * length + row
    tl.store(outgoing + side, out, mask=row < length)
    tl.store(incoming + side, into, mask=row < length)

    for v0 in range(part * BV, dv, parts * BV):
        in_v = v0 + tl.arange(0, BV)
        total = tl.zeros((BT, BV), tl.float32)
        for k0 in range(0, dk, BK):
            in_k = k0 + tl.arange(0, BK)
            keys = load_rows(k, loaded, k_t, in_k, dk).to(tl.float32) * alpha[:, None]
            dc = load_rows(dc_states + at * dk * dv, tl.minimum(in_k, dk - 1), dv, in_v, dv)
            total = tl.dot(keys.to(carried_type), dc, total, input_precision=PRECISION)
        grads = load_rows(dh, loaded, d_t, in_v, dv)
        total = tl.dot(tl.trans(scores), grads, total, input_precision=PRECISION)
        tl.store(
            dv_out + row[:, None] * (heads * dv) + in_v[None, :],
            total.to(dv_out.dtype.element_ty),
            mask=valid[:, None] & (in_v < dv)[None, :],
        )
