"""Triton kernels of the mLSTM's gates: :func:`gates.prepare` and :func:`gates.gradients` in few launches.

Those functions are the definition; tests compare. All arithmetic is float64, only weights of states leave as
float32. Three launches forwards, all chunks in parallel: how each chunk changes the stabiliser, a scan over
chunks, then every scalar of a chunk in one program (one launch if there is one chunk). Backwards the
stabiliser is known, so the scalars are one launch; the gate gradients are another, one program per head,
because the stabiliser's own gradient may run through the whole sequence.

Scans restart at cuts by selecting, not by subtracting: nothing before a cut changes a bit of what follows it.
"""

# The type checker knows neither branches on constants (names unbound on the other side) nor ``constexpr``.
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)) in float64; dividing by the rounded (1 + u) - 1 undoes its rounding."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.minimum(x, 0.0) - tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def then_max(decay, best, decay_next, best_next):
    """Two stretches of m' = max(m + decay, best), one after the other."""
    return decay + decay_next, tl.maximum(best + decay_next, best_next)


@triton.jit
def then_sum(x, cut, x_next, cut_next):
    """Sums that restart where ``cut`` is not 0."""
    return x_next + tl.where(cut_next != 0, 0.0, x), cut | cut_next


@triton.jit
def then_last(x, mark, x_next, mark_next):
    """The value at the last marked position."""
    return tl.where(mark_next != 0, x_next, x), mark | mark_next


@triton.jit
def load_gates(i, f, reset, i_t, f_t, position, valid, SIGMOID: tl.constexpr):
    """log i, log f (float64), whether a position forgets all, and whether it is a cut; nothing where not
    valid. Pointers stand at the head and sequence."""
    log_f = log_sigmoid(tl.load(f + position * f_t, mask=valid, other=float("inf")).to(tl.float64))
    log_i = tl.load(i + position * i_t, mask=valid, other=float("-inf")).to(tl.float64)
    if SIGMOID:
        log_i = log_sigmoid(log_i)
    forgotten = log_f == float("-inf")
    cut = forgotten
    if reset is not None:
        cut = cut | (tl.load(reset + position, mask=valid, other=0) != 0)
    return log_i, log_f, forgotten, cut


@triton.jit
def stabiliser_steps(log_i, log_f, cut):
    """decay and best of every position, for :func:`then_max`; after a cut the past is empty (m = 0)."""
    best = tl.where(cut, tl.maximum(log_f, log_i), log_i)
    best = tl.where(cut & (best == float("-inf")), 0.0, best)
    return tl.where(cut, float("-inf"), log_f), best


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def chunk_changes_kernel(
    i, f,  # (B, T, H)
    reset,  # (B, T) uint8 or None
    decay_out, best_out,  # out: (B * H, N) float64
    time, heads, length, chunks, i_b, i_t, i_h, f_b, f_t, f_h,
    BT: tl.constexpr,
):  # fmt: skip
    """How one chunk (L <= BT) changes the stabiliser: m' = max(m + decay, best)."""
    at = tl.program_id(0).to(tl.int64)
    pair, chunk = at // chunks, at % chunks
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, BT)
    position = chunk * length + row
    valid = (row < length) & (position < time)
    if reset is not None:
        reset += batch * time
    i += batch * i_b + head * i_h
    f += batch * f_b + head * f_h
    log_i, log_f, _, cut = load_gates(i, f, reset, i_t, f_t, position, valid, False)
    decay, best = stabiliser_steps(log_i, log_f, cut)
    decay, best = tl.associative_scan((decay, best), 0, then_max)
    tl.store(decay_out + at + row * 0, decay, mask=row == BT - 1)
    tl.store(best_out + at + row * 0, best, mask=row == BT - 1)


@triton.jit(do_not_specialize=["chunks"])
def entering_kernel(
    decay, best,  # (B * H, N) float64
    m0,  # (B * H,) float32
    entering,  # out: (B * H, N) float64: the stabiliser before each chunk
    chunks,
    BN: tl.constexpr,
):  # fmt: skip
    """The stabiliser entering every chunk of one head."""
    pair = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BN)
    m = tl.load(m0 + pair).to(tl.float64)
    tl.store(entering + pair * chunks, m)
    for start in range(0, chunks - 1, BN):
        inside = start + lane < chunks - 1
        at = pair * chunks + start + lane
        d = tl.load(decay + at, mask=inside, other=0.0)
        b = tl.load(best + at, mask=inside, other=float("-inf"))
        d, b = tl.associative_scan((d, b), 0, then_max)
        after = tl.maximum(m + d, b)
        tl.store(entering + at + 1, after, mask=inside)
        m = tl.max(tl.where(lane == BN - 1, after, float("-inf")), 0)


@triton.jit(do_not_specialize=["time", "length", "chunks"])
def scalars_kernel(
    i, f,  # (B, T, H)
    reset,  # (B, T) uint8 or None
    m0,  # (B * H,) float32
    entering,  # (B * H, N) float64, or None: one chunk, or m known
    m_all,  # (B * H, T) float64: the stabiliser; out, unless KNOWN
    rows, columns, segment,  # out: (B * H, N, L) float64, float64, int32
    carry_in, to_state,  # out: (B * H, N, L) float32
    keep,  # out: (B * H, N) float32
    floor,  # out: (B * H, T) float32: exp(-m)
    time, heads, length, chunks, i_b, i_t, i_h, f_b, f_t, f_h,
    SIGMOID: tl.constexpr, KNOWN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Every scalar of one chunk (L <= BT)."""
    at = tl.program_id(0).to(tl.int64)
    pair, chunk = at // chunks, at % chunks
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, BT)
    position = chunk * length + row
    inside = row < length
    valid = inside & (position < time)
    if reset is not None:
        reset += batch * time
    i += batch * i_b + head * i_h
    f += batch * f_b + head * f_h
    log_i, log_f, _, cut = load_gates(i, f, reset, i_t, f_t, position, valid, SIGMOID)
    number = cut.to(tl.int32)
    last = row == BT - 1

    before = tl.load(m0 + pair).to(tl.float64)
    m_all += pair * time
    if SIGMOID:
        before *= 0.0
        m = log_f * 0.0
    elif KNOWN:
        if chunk > 0:
            before = tl.load(m_all + chunk * length - 1)
        final = tl.minimum(chunk * length + length, time) - 1  # padding repeats the last one
        m = tl.load(m_all + tl.minimum(position, final))
    else:
        if entering is not None:
            before = tl.load(entering + at)
        decay, best = stabiliser_steps(log_i, log_f, cut)
        decay, best = tl.associative_scan((decay, best), 0, then_max)
        m = tl.maximum(best, decay + before)
    if not KNOWN:
        tl.store(m_all + position, m, mask=valid)
    low = tl.where(m < -88.7, float("inf"), tl.exp(-tl.maximum(m, -88.7)))
    tl.store(floor + pair * time + position, low.to(tl.float32), mask=valid)

    b, _ = tl.associative_scan((tl.where(cut, 0.0, log_f), number), 0, then_sum)
    parts = tl.cumsum(number, 0)
    row_values = b - m
    column_values = log_i - b
    # relative to the row where their segment begins: smaller, and nothing before a cut enters
    anchor, _ = tl.associative_scan((row_values, tl.where(row == 0, 1, number)), 0, then_last)
    to = at * length + row
    tl.store(rows + to, row_values - anchor, mask=inside)
    tl.store(columns + to, column_values + anchor, mask=inside)
    tl.store(segment + to, parts, mask=inside)

    b_last, m_last = tl.sum(tl.where(last, b, 0.0), 0), tl.sum(tl.where(last, m, 0.0), 0)
    parts_last = tl.sum(tl.where(last, parts, 0), 0)
    leave = b_last - m_last
    carried = tl.exp(tl.where(parts == 0, row_values + before, float("-inf")))
    tl.store(carry_in + to, carried.to(tl.float32), mask=inside)
    added = tl.exp(tl.where(parts == parts_last, column_values + leave, float("-inf")))
    tl.store(to_state + to, added.to(tl.float32), mask=inside)
    kept = tl.exp(tl.where(parts_last == 0, leave + before, float("-inf")))
    tl.store(keep + at, kept.to(tl.float32))


@triton.jit
def origin(i, f, reset, m0, m_all, i_t, f_t, position, valid, SIGMOID: tl.constexpr):
    """Whether a position is a cut, and whether its m came from the forget gate."""
    log_i, log_f, forgotten, cut = load_gates(i, f, reset, i_t, f_t, position, valid, SIGMOID)
    by_forget = valid
    if not SIGMOID:
        before = tl.load(m_all + position - 1, mask=valid & (position > 0), other=0.0)
        before = tl.where(position == 0, m0, before)
        by_forget = (log_f + tl.where(cut, 0.0, before) >= log_i) & (forgotten == 0)
    return cut, by_forget


@triton.jit(do_not_specialize=["time", "length", "chunks", "parts", "tiles", "eps"])
def gate_gradients_kernel(
    i, f,  # (B, T, H)
    reset,  # (B, T) uint8 or None
    m0,  # (B * H,) float32
    m_all,  # (B * H, T) float64
    outgoing, incoming,  # (parts, B * H, N, L) float32: q . dq, k . dk
    flow,  # (B * H, N, tiles) float32: parts of <C, dC> + n . dn entering each chunk
    last_flow,  # (B * H,) float64: the same of the last state
    along,  # (B * H, T) float32: (dh . h) / den
    end,  # (B * H,) float64: gradient of the last m, less last_flow
    di, df,  # out: (B, T, H), contiguous
    dm0,  # out: (B * H,) float32
    eps,
    time, heads, length, chunks, parts, tiles, i_b, i_t, i_h, f_b, f_t, f_h,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates and of the first m of one head, BT positions at a time from the end.

    ``sums``: of q . dq - k . dk from a position to its chunk's or segment's end, with the state's part at the
    chunk's end. ``mu``: the stabiliser's gradient, which ends where m came from an input gate.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    pairs = tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, BT)
    padded = chunks.to(tl.int64) * length
    if reset is not None:
        reset += batch * time
    i += batch * i_b + head * i_h
    f += batch * f_b + head * f_h
    m_all += pair * time
    flow += pair * chunks * tiles
    first_m = tl.load(m0 + pair).to(tl.float64)
    carried = first_m * 0.0
    carried_mu = first_m * 0.0
    starts_here = 0
    blocks = tl.cdiv(padded, BT)
    for back in range(blocks):
        position = (blocks - 1 - back) * BT + lane
        inside, valid = position < padded, position < time
        out = tl.zeros((BT,), tl.float64)
        into = tl.zeros((BT,), tl.float64)
        for part in range(parts):
            at = (part * pairs + pair) * padded + position
            out += tl.load(outgoing + at, mask=inside, other=0.0).to(tl.float64)
            into += tl.load(incoming + at, mask=inside, other=0.0).to(tl.float64)
        x = out - into
        chunk = position // length
        ends = position % length == length - 1
        for tile in range(tiles):
            where = (chunk + 1) * tiles + tile
            x += tl.load(flow + where, mask=ends & (chunk + 1 < chunks), other=0.0).to(tl.float64)
        x += tl.where(ends & (chunk == chunks - 1), tl.load(last_flow + pair), 0.0)
        cut, by_forget = origin(i, f, reset, first_m, m_all, i_t, f_t, position, valid, SIGMOID)
        cut_next, by_next = origin(
            i, f, reset, first_m, m_all, i_t, f_t, position + 1, position + 1 < time, SIGMOID
        )
        sums, stopped = tl.associative_scan((x, (ends | cut_next).to(tl.int32)), 0, then_sum, reverse=True)
        sums += tl.where(stopped != 0, 0.0, carried)
        carried = tl.sum(tl.where(lane == 0, sums, 0.0), 0)
        d_f = tl.where(cut, 0.0, sums)
        d_i = into
        if not SIGMOID:
            path = tl.where(position == time - 1, tl.load(end + pair), 0.0)
            if NORMALIZE:
                path -= eps * tl.load(along + pair * time + position, mask=valid, other=0.0).to(tl.float64)
            stop = (position + 1 < time) & (cut_next | (by_next == 0))
            mu, stopped = tl.associative_scan((path, stop.to(tl.int32)), 0, then_sum, reverse=True)
            mu += tl.where(stopped != 0, 0.0, carried_mu)
            carried_mu = tl.sum(tl.where(lane == 0, mu, 0.0), 0)
            starts_here = tl.sum(tl.where((lane == 0) & (cut | (by_forget == 0)), 1, 0), 0)
            d_f += tl.where(by_forget, mu, 0.0)
        f_value = tl.load(f + position * f_t, mask=valid, other=0.0).to(tl.float64)
        i_value = tl.load(i + position * i_t, mask=valid, other=0.0).to(tl.float64)
        d_f *= tl.exp(log_sigmoid(-f_value))
        if SIGMOID:
            d_i *= tl.exp(log_sigmoid(-i_value))
        else:
            d_i += tl.where((by_forget == 0) & (i_value > float("-inf")), mu, 0.0)
        to = (batch * time + position) * heads + head
        tl.store(df + to, d_f.to(tl.float32).to(df.dtype.element_ty), mask=valid)
        tl.store(di + to, d_i.to(tl.float32).to(di.dtype.element_ty), mask=valid)
    result = carried_mu * 0.0
    if not SIGMOID:
        for tile in range(tiles):
            result += tl.load(flow + tile).to(tl.float64)
        result += tl.where(starts_here != 0, 0.0, carried_mu)
    tl.store(dm0 + pair, result.to(tl.float32))
