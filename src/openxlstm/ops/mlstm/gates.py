"""Scalar work of the chunkwise mLSTM: everything that depends on gates alone, forwards and backwards.

The stabiliser ``m_t = max(l_t + m_{t-1}, i_t)`` is a max-plus prefix scan of scalars, so it is known for the
whole sequence before any matrix product, and no product needs rescaling. All of it runs in float64 (where the
device has it): sums of log gates cancel, and there is only one scalar for every DK + DV matrix entries.

A *cut* is a position whose past does not count: a document start, or ``f = -inf``. Sums restart there, so
that what lies before a cut cannot change a bit of what lies after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad


class Gates(NamedTuple):
    """Scalars of one sequence, chunked: (B, H, N, L) for N chunks of L positions, unless noted.

    Padded positions at the end neither keep nor add anything. With D_ts = rows_t + columns_s, position s
    reaches position t of its chunk with weight exp(D_ts) if s <= t and both have the same segment.
    """

    rows: Tensor
    """b_t - m_t, float64; b is the sum of log forget gates since the chunk's or segment's start."""
    columns: Tensor
    """i_s - b_s, float64."""
    segment: Tensor
    """Number of cuts in the chunk up to and including the position."""
    carry_in: Tensor
    """Weight of the state entering the chunk at each position (beta)."""
    to_state: Tensor
    """Weight of each position in the state leaving the chunk (a-bar)."""
    keep: Tensor
    """(B, H, N): weight of the entering state in the leaving one (g-bar)."""
    m: Tensor
    """(B, H, T) float64 stabiliser."""
    by_forget: Tensor
    """(B, H, T) bool: m_t came from l_t + m_{t-1} (else from i_t)."""
    cut: Tensor
    """(B, H, T) bool."""


def segmented_cumsum(x: Tensor, starts: Tensor) -> Tensor:
    """Prefix sums along the last dimension that restart wherever ``starts`` is True.

    Doubling steps: what lies before a start is never touched by what lies after, and cannot change its bits.
    """
    x, blocked = x.clone(), starts.clone()
    shift = 1
    while shift < x.shape[-1]:
        added = torch.where(blocked[..., shift:], 0.0, x[..., :-shift])
        x[..., shift:] += added  # `added` is a copy, so the overlap is harmless
        blocked[..., shift:] = blocked[..., shift:] | blocked[..., :-shift].clone()
        shift *= 2
    return x


def segmented_suffix_sum(x: Tensor, starts: Tensor) -> Tensor:
    """Suffix sums along the last dimension: position t sums up to the last one before the next start."""
    ends = pad(starts[..., 1:], (0, 1), value=False)
    return segmented_cumsum(x.flip(-1), ends.flip(-1)).flip(-1)


def stabiliser(log_f: Tensor, log_i: Tensor, m0: Tensor) -> Tensor:
    """``m_t = max(log_f_t + m_{t-1}, log_i_t)`` for all t, from ``m_{-1} = m0``; (..., T) and (...)."""
    decay, best = log_f.clone(), log_i.clone()
    shift = 1
    while shift < decay.shape[-1]:
        best[..., shift:] = torch.maximum(best[..., shift:], decay[..., shift:] + best[..., :-shift])
        decay[..., shift:] = decay[..., shift:] + decay[..., :-shift]
        shift *= 2
    return torch.maximum(best, decay + m0[..., None])


def prepare(
    i: Tensor,  # (B, T, H)
    f: Tensor,  # (B, T, H)
    m0: Tensor,  # (B, H)
    reset: Tensor | None,  # (B, T)
    chunk_size: int,
    sigmoid: bool,
) -> Gates:
    """All gate scalars for chunks of ``chunk_size``; T >= 1."""
    dtype = torch.float32 if i.device.type == "mps" else torch.float64
    log_f = logsigmoid(f.transpose(1, 2).to(dtype))
    log_i = i.transpose(1, 2).to(dtype)
    forgotten = log_f == -torch.inf
    cut = forgotten if reset is None else forgotten | reset[:, None]
    time = log_f.shape[-1]

    if sigmoid:
        log_i = logsigmoid(log_i)
        m = torch.zeros_like(log_f)
        m_in = torch.zeros_like(m0, dtype=dtype)
        by_forget = torch.ones_like(cut)
    else:
        m_in = m0.to(dtype)
        # at a cut the past is empty: after a reset m restarts from 0, after f = -inf only i_t is left,
        # and with nothing added either (i = -inf) the state is the empty one, m = 0
        fresh = torch.where(cut, torch.maximum(log_f, log_i), log_i)
        fresh = torch.where(cut & (fresh == -torch.inf), 0.0, fresh)
        m = stabiliser(torch.where(cut, -torch.inf, log_f), fresh, m_in)
        before = torch.cat([m_in[..., None], m[..., :-1]], -1)
        before = torch.where(cut, 0.0, before)
        by_forget = (log_f + before >= log_i) & ~forgotten

    chunks = -(-time // chunk_size)
    tail = chunks * chunk_size - time

    def chunked(x: Tensor, value: float | bool) -> Tensor:
        return pad(x, (0, tail), value=value).unflatten(-1, (chunks, chunk_size))

    decay = torch.where(cut, 0.0, log_f)  # a cut's own forget gate acts on nothing
    cuts = chunked(cut, False)
    b = segmented_cumsum(chunked(decay, 0.0), cuts)
    m_rows = torch.cat([m, m[..., -1:].expand(*m.shape[:-1], tail)], -1).unflatten(-1, (chunks, chunk_size))
    segment = cuts.cumsum(-1)
    rows = b - m_rows
    columns = chunked(log_i, -torch.inf) - b
    m_out = m_rows[..., -1]  # (B, H, N)
    m_prev = torch.cat([m_in[..., None], m_out[..., :-1]], -1)
    first, last = segment == 0, segment == segment[..., -1:]
    carry_in = torch.where(first, rows + m_prev[..., None], -torch.inf).exp()
    leave = b[..., -1:] - m_out[..., None]  # what still decays until the chunk's end
    to_state = torch.where(last, columns + leave, -torch.inf).exp()
    keep = torch.where(segment[..., -1] == 0, leave[..., 0] + m_prev, -torch.inf).exp()
    return Gates(rows, columns, segment, carry_in, to_state, keep, m, by_forget, cut)


def gradients(
    gates: Gates,
    row_flow: Tensor,  # (B, H, N, L) q.dq - k.dk
    chunk_flow: Tensor,  # (B, H, N) <C, dC> + n.dn of the state leaving each chunk
    first_flow: Tensor,  # (B, H) the same of the initial state
    di: Tensor,  # (B, H, T) k.dk
    path: Tensor,  # (B, H, T) gradient that enters the stabiliser at each position
    path_end: Tensor,  # (B, H) gradient of the last stabiliser
    i: Tensor,  # (B, T, H)
    f: Tensor,  # (B, T, H)
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gate pre-activations i, f (B, T, H) and of the initial m (B, H).

    The gradient of a log forget gate is the flow from positions before it to positions from it on, summed
    inside the chunk only. The stabiliser's own gradient runs backwards along m_t = l_t + m_{t-1} until a
    position whose m came from its input gate takes all of it.
    """
    time = di.shape[-1]
    row_flow = row_flow.clone()
    row_flow[..., -1] += chunk_flow
    cuts = pad(gates.cut, (0, row_flow.shape[-2] * row_flow.shape[-1] - time), value=False)
    flow = segmented_suffix_sum(row_flow, cuts.view(row_flow.shape)).flatten(-2)[..., :time]
    d_log_f = torch.where(gates.cut, 0.0, flow)
    dm0 = torch.zeros_like(first_flow)
    if not sigmoid:
        path = path.clone()
        path[..., -1] += path_end
        starts = gates.cut | ~gates.by_forget
        mu = segmented_suffix_sum(path, starts)
        d_log_f = d_log_f + torch.where(gates.by_forget, mu, 0.0)
        by_input = ~gates.by_forget & (i.transpose(1, 2) > -torch.inf)
        di = di + torch.where(by_input, mu, 0.0)
        dm0 = first_flow + torch.where(starts[..., 0], 0.0, mu[..., 0])
    df = d_log_f * torch.sigmoid(-f.transpose(1, 2).to(d_log_f.dtype))
    if sigmoid:
        di = di * torch.sigmoid(-i.transpose(1, 2).to(di.dtype))
    return di.transpose(1, 2), df.transpose(1, 2), dm0
