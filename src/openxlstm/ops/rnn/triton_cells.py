"""Triton kernels of the recurrent operator (FlashRNN): forward and backward over time, and single positions.

Fused: one program walks over all positions of one head and 16 rows of the batch, with the head's recurrent
matrices on the chip; heads and rows never wait for each other, so there is no grid synchronisation.
Alternating: the same kernel does the pointwise part of one position, between matrix products that PyTorch
launches; for head dimensions whose matrices do not fit. Equations: :mod:`openxlstm.ops.rnn.cells`; buffers
and the backward pass: :mod:`openxlstm.ops.rnn.scan_cells`. States and gates are float32; only operands of
products are narrower.
"""

# The type checker knows neither branches on constants (names unbound on the other side) nor ``constexpr``.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

SLSTM = tl.constexpr(0)
LSTM = tl.constexpr(1)
GRU = tl.constexpr(2)
ELMAN = tl.constexpr(3)
# "CELL <= LSTM": the two that have a memory c


@triton.jit
def sigmoid(x):
    """Without overflow on either side."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def tanh(x):
    """Without overflow on either side."""
    u = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - u) / (1.0 + u)
    return tl.where(x >= 0, t, -t)


@triton.jit
def log_sigmoid(x):
    """By its series where 1 + u would lose u."""
    u = tl.exp(-tl.abs(x))
    return tl.minimum(x, 0.0) - tl.where(u < 1e-2, u * (1.0 - u * (0.5 - u / 3.0)), tl.log(1.0 + u))


@triton.jit
def load_inputs(x, stride, inside, CELL: tl.constexpr):
    """The input tiles of one position, by slot, as they are; zeros for slots without input (the GRU's g)."""
    a = tl.load(x, mask=inside, other=0.0)
    if CELL == ELMAN:
        return a, a, a, a
    b = tl.load(x + stride, mask=inside, other=0.0)
    c = tl.load(x + 2 * stride, mask=inside, other=0.0)
    if CELL == GRU:
        return tl.zeros_like(a), a, b, c
    return a, b, c, tl.load(x + 3 * stride, mask=inside, other=0.0)


@triton.jit
def load_matrix(weight, d, row, column, ROW_STEP: tl.constexpr, dtype: tl.constexpr):
    """A square matrix as a tile: its rows (ROW_STEP) or its columns along the tile's rows."""
    where = row[:, None] * d + column[None, :] if ROW_STEP else column[None, :] * d + row[:, None]
    inside = (row < d)[:, None] & (column < d)[None, :]
    matrix = tl.load(weight + where, mask=inside, other=0.0).to(dtype)
    if matrix.shape[0] > 64:  # one matrix at a time: all at once take more registers than there are
        tl.debug_barrier()
    return matrix


@triton.jit(do_not_specialize=["begin", "end", "time", "batch", "floor"])
def forward_kernel(
    x,  # (B, T, G, H, D); unused when not FUSED
    weight,  # (G_r, H, D_out, D_in) float32
    bias,  # (G_b, H, D) float32 or None
    reset,  # (B, T) int8 or None
    state, last,  # (S, H, B, D) float32, last out; the same memory is fine
    h_out,  # out: (B, T, H, D) float32
    hs, gates, memory, factors,  # out if KEEP; gates hold the pre-activations when not FUSED
    begin, end, time, batch, heads, d, floor,
    x_b, x_t, x_g, x_h,
    CELL: tl.constexpr, FUSED: tl.constexpr, KEEP: tl.constexpr, HAS_FLOOR: tl.constexpr,
    PRODUCT: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Positions begin to end of one head, BB rows and BD dimensions."""
    head = tl.program_id(0)
    row = tl.program_id(1) * BB + tl.arange(0, BB)
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = (row < batch)[:, None] & (column < d)[None, :]
    cell = row[:, None] * d + column[None, :]  # within (B, D)
    plane = batch.to(tl.int64) * heads * d  # of one leaf (H, B, D)
    here = head.to(tl.int64) * batch * d + cell
    h = tl.load(state + here, mask=inside, other=0.0)
    c = tl.zeros((BB, BD), tl.float32)
    n = tl.zeros((BB, BD), tl.float32)
    m = tl.zeros((BB, BD), tl.float32)
    if CELL <= LSTM:
        c = tl.load(state + plane + here, mask=inside, other=0.0)
    if CELL == SLSTM:
        n = tl.load(state + 2 * plane + here, mask=inside, other=0.0)
        m = tl.load(state + 3 * plane + here, mask=inside, other=0.0)
    SLOTS: tl.constexpr = 1 if CELL == ELMAN else 4
    MEMORY: tl.constexpr = 2 if CELL == SLSTM else 1
    if KEEP:
        hs += head.to(tl.int64) * (time + 1) * batch * d + cell
        gates += head.to(tl.int64) * time * batch * SLOTS * d + row[:, None] * SLOTS * d + column[None, :]
        if begin == 0:
            tl.store(hs, h, mask=inside)
            if CELL <= LSTM:
                tl.store(memory + here, c, mask=inside)
            if CELL == SLSTM:
                tl.store(memory + plane + here, n, mask=inside)
    if FUSED:
        square = d * d
        w = weight + head * square
        r0 = load_matrix(w, d, column, column, False, PRODUCT)
        if CELL != ELMAN:
            r1 = load_matrix(w + heads * square, d, column, column, False, PRODUCT)
            r2 = load_matrix(w + 2 * heads * square, d, column, column, False, PRODUCT)
        if CELL <= LSTM:
            r3 = load_matrix(w + 3 * heads * square, d, column, column, False, PRODUCT)
        x += row.to(tl.int64)[:, None] * x_b + head.to(tl.int64) * x_h + column[None, :]
        a0, a1, a2, a3 = load_inputs(x + tl.cast(begin, tl.int64) * x_t, x_g, inside, CELL)
        b0 = tl.zeros((BD,), tl.float32)
        b1 = b0
        b2 = b0
        b3 = b0
        if bias is not None:
            biases = bias + head * d + column
            b0 = tl.load(biases, mask=column < d, other=0.0)
            if CELL != ELMAN:
                b1 = tl.load(biases + heads * d, mask=column < d, other=0.0)
                b2 = tl.load(biases + 2 * heads * d, mask=column < d, other=0.0)
                b3 = tl.load(biases + 3 * heads * d, mask=column < d, other=0.0)
    for t in range(begin, end):
        at = tl.cast(t, tl.int64)
        if reset is not None:
            drop = tl.load(reset + row.to(tl.int64) * time + t, mask=row < batch, other=0)[:, None] != 0
            h = tl.where(drop, 0.0, h)
            c = tl.where(drop, 0.0, c)
            n = tl.where(drop, 0.0, n)
            m = tl.where(drop, 0.0, m)
        if FUSED:
            operand = h.to(PRODUCT)
            p0 = a0.to(tl.float32) + b0[None, :]
            p0 = tl.dot(operand, r0, p0, input_precision=PRECISION)
            if CELL != ELMAN:
                p1 = a1.to(tl.float32) + b1[None, :]
                p2 = a2.to(tl.float32) + b2[None, :]
                p3 = a3.to(tl.float32) + b3[None, :]
                p1 = tl.dot(operand, r1, p1, input_precision=PRECISION)
                p2 = tl.dot(operand, r2, p2, input_precision=PRECISION)
            if CELL <= LSTM:
                p3 = tl.dot(operand, r3, p3, input_precision=PRECISION)
            if t + 1 < end:  # the next inputs travel while this position is computed
                a0, a1, a2, a3 = load_inputs(x + (at + 1) * x_t, x_g, inside, CELL)
        else:
            slot = gates + at * batch * SLOTS * d
            p0 = tl.load(slot, mask=inside, other=0.0)
            if CELL != ELMAN:
                p1 = tl.load(slot + d, mask=inside, other=0.0)
                p2 = tl.load(slot + 2 * d, mask=inside, other=0.0)
                p3 = tl.load(slot + 3 * d, mask=inside, other=0.0)
        if CELL == SLSTM:
            log_f = m + log_sigmoid(p1)
            m = tl.where(n == 0, p0, tl.maximum(p0, log_f))
            i = tl.exp(tl.minimum(p0 - m, 0.0))
            f = tl.exp(tl.minimum(log_f - m, 0.0))
            p2 = tanh(p2)
            p3 = sigmoid(p3)
            c = f * c + i * p2
            n = f * n + i
            if HAS_FLOOR:
                n = tl.maximum(n, floor)
            h = p3 * (c / n)
            if KEEP:
                pair = factors + at * 2 * plane + here
                tl.store(pair, i, mask=inside)
                tl.store(pair + plane, f, mask=inside)
        elif CELL == LSTM:
            p0 = sigmoid(p0)
            p1 = sigmoid(p1)
            p2 = tanh(p2)
            p3 = sigmoid(p3)
            c = p1 * c + p0 * p2
            h = p3 * tanh(c)
        elif CELL == GRU:
            p1 = sigmoid(p1)
            p2 = sigmoid(p2)
            p3 = tanh(p3 + p1 * p0)
            h = p2 * h + (1.0 - p2) * p3
        else:
            h = tanh(p0)
        tl.store(
            h_out + ((row.to(tl.int64) * time + t) * heads + head)[:, None] * d + column[None, :],
            h,
            mask=inside,
        )
        if KEEP:
            tl.store(hs + (at + 1) * batch * d, h, mask=inside)
            slot = gates + at * batch * SLOTS * d
            tl.store(slot, p0, mask=inside)
            if CELL != ELMAN:
                tl.store(slot + d, p1, mask=inside)
                tl.store(slot + 2 * d, p2, mask=inside)
                tl.store(slot + 3 * d, p3, mask=inside)
            if CELL <= LSTM:
                tl.store(memory + (at + 1) * MEMORY * plane + here, c, mask=inside)
            if CELL == SLSTM:
                tl.store(memory + ((at + 1) * MEMORY + 1) * plane + here, n, mask=inside)
    tl.debug_barrier()  # ``last`` may be ``state``: let every thread have read before any overwrites
    tl.store(last + here, h, mask=inside)
    if CELL <= LSTM:
        tl.store(last + plane + here, c, mask=inside)
    if CELL == SLSTM:
        tl.store(last + 2 * plane + here, n, mask=inside)
        tl.store(last + 3 * plane + here, m, mask=inside)


@triton.jit(do_not_specialize=["begin", "end", "time", "batch", "floor"])
def backward_kernel(
    weight,  # (G_r, H, D_out, D_in) float32; unused when not FUSED
    reset,  # (B, T) int8 or None
    hs, gates, memory, factors,  # of the forward pass
    d_h,  # (B, T, H, D) float32
    d_state,  # (S, H, B, D) float32: gradient of the state after position end - 1; out: before begin
    d_gates,  # out: (H, T, B, G_b, D)
    begin, end, time, batch, heads, d, floor,
    CELL: tl.constexpr, FUSED: tl.constexpr, HAS_FLOOR: tl.constexpr,
    PRODUCT: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From position end - 1 back to begin. What reaches h through the weight is left out when not FUSED."""
    head = tl.program_id(0)
    row = tl.program_id(1) * BB + tl.arange(0, BB)
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = (row < batch)[:, None] & (column < d)[None, :]
    cell = row[:, None] * d + column[None, :]
    plane = batch.to(tl.int64) * heads * d
    here = head.to(tl.int64) * batch * d + cell
    SLOTS: tl.constexpr = 1 if CELL == ELMAN else 4
    hs += head.to(tl.int64) * (time + 1) * batch * d + cell
    slots = head.to(tl.int64) * time * batch * SLOTS * d + row[:, None] * SLOTS * d + column[None, :]
    gates += slots
    d_gates += slots
    carried = tl.load(d_state + here, mask=inside, other=0.0)
    d_c = tl.zeros((BB, BD), tl.float32)
    d_n = tl.zeros((BB, BD), tl.float32)
    d_m = tl.zeros((BB, BD), tl.float32)
    if CELL <= LSTM:
        d_c = tl.load(d_state + plane + here, mask=inside, other=0.0)
    if CELL == SLSTM:
        d_n = tl.load(d_state + 2 * plane + here, mask=inside, other=0.0)
        d_m = tl.load(d_state + 3 * plane + here, mask=inside, other=0.0)
    if FUSED:
        square = d * d
        w = weight + head * square
        r0 = load_matrix(w, d, column, column, True, PRODUCT)
        if CELL != ELMAN:
            r1 = load_matrix(w + heads * square, d, column, column, True, PRODUCT)
            r2 = load_matrix(w + 2 * heads * square, d, column, column, True, PRODUCT)
        if CELL <= LSTM:
            r3 = load_matrix(w + 3 * heads * square, d, column, column, True, PRODUCT)
    for back in range(begin, end):
        t = end - 1 - (back - begin)
        at = tl.cast(t, tl.int64)
        upstream = d_h + ((row.to(tl.int64) * time + t) * heads + head)[:, None] * d + column[None, :]
        error = tl.load(upstream, mask=inside, other=0.0) + carried
        slot = gates + at * batch * SLOTS * d
        h = tl.load(hs + (at + 1) * batch * d, mask=inside, other=0.0)
        if reset is not None:
            drop = tl.load(reset + row.to(tl.int64) * time + t, mask=row < batch, other=0)[:, None] != 0
        if CELL != ELMAN:
            g0 = tl.load(slot, mask=inside, other=0.0)
            g1 = tl.load(slot + d, mask=inside, other=0.0)
            g2 = tl.load(slot + 2 * d, mask=inside, other=0.0)
            g3 = tl.load(slot + 3 * d, mask=inside, other=0.0)
        carried = tl.zeros((BB, BD), tl.float32)
        if CELL == SLSTM:
            c_before = tl.load(memory + at * 2 * plane + here, mask=inside, other=0.0)
            n_before = tl.load(memory + (at * 2 + 1) * plane + here, mask=inside, other=0.0)
            n = tl.load(memory + (at * 2 + 3) * plane + here, mask=inside, other=1.0)
            i = tl.load(factors + at * 2 * plane + here, mask=inside, other=0.0)
            f = tl.load(factors + (at * 2 + 1) * plane + here, mask=inside, other=0.0)
            if reset is not None:
                c_before = tl.where(drop, 0.0, c_before)
                n_before = tl.where(drop, 0.0, n_before)
            d_c += g3 / n * error
            d_n -= h / n * error
            if HAS_FLOOR:
                d_n = tl.where(f * n_before + i >= floor, d_n, 0.0)
            d3 = h * (1.0 - g3) * error
            d2 = i * (1.0 - g2 * g2) * d_c
            d0 = i * (g2 * d_c + d_n)
            d1 = f * (c_before * d_c + n_before * d_n)
            # which argument the maximum m was: its slope, shared at ties
            share = tl.where(i == 1.0, 0.5, 1.0)
            from_f = tl.where((f == 1.0) & (n_before != 0.0), share, 0.0)
            rest = d_m - d0 - d1
            d0 += (1.0 - from_f) * rest
            d1 += from_f * rest
            d_m = d1
            d1 *= sigmoid(-g1)
            d_c *= f
            d_n *= f
        elif CELL == LSTM:
            c_before = tl.load(memory + at * plane + here, mask=inside, other=0.0)
            if reset is not None:
                c_before = tl.where(drop, 0.0, c_before)
            squashed = tanh(tl.load(memory + (at + 1) * plane + here, mask=inside, other=0.0))
            d_c += g3 * (1.0 - squashed * squashed) * error
            d3 = g3 * (1.0 - g3) * squashed * error
            d0 = g2 * g0 * (1.0 - g0) * d_c
            d1 = c_before * g1 * (1.0 - g1) * d_c
            d2 = g0 * (1.0 - g2 * g2) * d_c
            d_c *= g1
        elif CELL == GRU:
            h_before = tl.load(hs + at * batch * d, mask=inside, other=0.0)
            if reset is not None:
                h_before = tl.where(drop, 0.0, h_before)
            d3 = (1.0 - g2) * (1.0 - g3 * g3) * error
            d0 = d3 * g1
            d1 = d3 * g0 * g1 * (1.0 - g1)
            d2 = (h_before - g3) * g2 * (1.0 - g2) * error
            carried = g2 * error
        else:
            d0 = (1.0 - h * h) * error
        out = d_gates + at * batch * SLOTS * d
        tl.store(out, d0, mask=inside)
        if CELL != ELMAN:
            tl.store(out + d, d1, mask=inside)
            tl.store(out + 2 * d, d2, mask=inside)
            tl.store(out + 3 * d, d3, mask=inside)
        if FUSED:
            carried = tl.dot(d0.to(PRODUCT), r0, carried, input_precision=PRECISION)
            if CELL != ELMAN:
                carried = tl.dot(d1.to(PRODUCT), r1, carried, input_precision=PRECISION)
                carried = tl.dot(d2.to(PRODUCT), r2, carried, input_precision=PRECISION)
            if CELL <= LSTM:
                carried = tl.dot(d3.to(PRODUCT), r3, carried, input_precision=PRECISION)
        if reset is not None:
            carried = tl.where(drop, 0.0, carried)
            d_c = tl.where(drop, 0.0, d_c)
            d_n = tl.where(drop, 0.0, d_n)
            d_m = tl.where(drop, 0.0, d_m)
    tl.debug_barrier()
    tl.store(d_state + here, carried, mask=inside)
    if CELL <= LSTM:
        tl.store(d_state + plane + here, d_c, mask=inside)
    if CELL == SLSTM:
        tl.store(d_state + 2 * plane + here, d_n, mask=inside)
        tl.store(d_state + 3 * plane + here, d_m, mask=inside)
