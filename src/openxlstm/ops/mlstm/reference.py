"""The mLSTM by definition: short, differentiable any number of times, float64-capable. The truth for tests.

Recurrent form (xLSTM paper, stabilised), per head, with ``l_t = log sigmoid(f_t)``:

    m_t = max(l_t + m_{t-1}, i_t)
    C_t = exp(l_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T        n_t likewise with k_t
    h_t = s C_t^T q_t / (max(|s n_t . q_t|, exp(-m_t)) + eps)                s = DK^-1/2

``exp(m) C`` is the memory; m only scales it. The sigmoid input gate has ``log sigmoid(i_t)`` in place of i_t,
m = 0 and the denominator ``max(|s n . q|, 1) + eps``, or none at all (``normalize=False``).
A position with ``reset`` starts from the empty state C = n = m = 0; ``f_t = -inf`` forgets everything, too.
Both cut exactly: no value or gradient crosses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def recurrent(
    q: Tensor,  # (B, T, H, DK)
    k: Tensor,  # (B, T, H, DK)
    v: Tensor,  # (B, T, H, DV)
    i: Tensor,  # (B, T, H)
    f: Tensor,  # (B, T, H)
    c: Tensor,  # (B, H, DK, DV)
    n: Tensor,  # (B, H, DK)
    m: Tensor,  # (B, H)
    reset: Tensor | None,  # (B, T)
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step after the other: h (B, T, H, DV) and the last c, n, m. ``chunk_size`` has no effect."""
    outputs = []
    if sigmoid:
        m = torch.zeros_like(m)
    for t in range(q.shape[1]):
        if reset is not None:
            start = reset[:, t, None]
            c = torch.where(start[..., None, None], 0.0, c)
            n = torch.where(start[..., None], 0.0, n)
            m = torch.where(start, 0.0, m)
        h, c, n, m = step(
            q[:, t],
            k[:, t],
            v[:, t],
            i[:, t],
            f[:, t],
            c,
            n,
            m,
            sigmoid=sigmoid,
            normalize=normalize,
            eps=eps,
        )
        outputs.append(h)
    h = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return h, c, n, m


def step(
    q: Tensor,  # (B, H, DK)
    k: Tensor,  # (B, H, DK)
    v: Tensor,  # (B, H, DV)
    i: Tensor,  # (B, H)
    f: Tensor,  # (B, H)
    c: Tensor,  # (B, H, DK, DV)
    n: Tensor,  # (B, H, DK)
    m: Tensor,  # (B, H)
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token: h (B, H, DV) in the dtype of v, and the new c, n, m in theirs."""
    dtype = c.dtype
    qs, k, x, log_f = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype), logsigmoid(f.to(dtype))
    if sigmoid:
        log_i, m_new = logsigmoid(i.to(dtype)), torch.zeros_like(m)
        kept, added = log_f.exp(), log_i.exp()
    else:
        log_i = i.to(dtype)
        m_new = torch.where(log_f + m >= log_i, log_f + m, log_i)
        m_new = torch.where(m_new == -torch.inf, 0.0, m_new)  # nothing kept, nothing added: the empty state
        kept, added = (log_f + m - m_new).exp(), (log_i - m_new).exp()
    wk = added[..., None] * k
    c = kept[..., None, None] * c + wk[..., :, None] * x[..., None, :]
    n = kept[..., None] * n + wk
    h = (qs[..., None, :] @ c).squeeze(-2)
    if normalize:
        r = (qs * n).sum(-1)
        h = h / (torch.maximum(r.abs(), (-m_new).exp()) + eps)[..., None]
    return h.to(v.dtype), c, n, m_new


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All steps at once, quadratic in time. Shapes and results as :func:`recurrent`.

    With ``D_ts = sum_{u=s+1..t} l_u + i_s`` for s <= t in the same document, ``m_t = max_s D_ts`` (and the
    path that carries the initial m), ``A = (s q k^T) * exp(D - m)``: ``num = A v``, ``r = A 1``.
    """
    time, qk_dim = q.shape[1], q.shape[-1]
    dtype = c.dtype
    if time == 0:
        return torch.zeros_like(v), c, n, torch.zeros_like(m) if sigmoid else m
    qs, kh, vh = ((x.to(dtype)).transpose(1, 2) for x in (q * qk_dim**-0.5, k, v))  # (B, H, T, D)
    log_f = logsigmoid(f.to(dtype)).transpose(1, 2)  # (B, H, T)
    log_i = i.to(dtype).transpose(1, 2)
    log_i = logsigmoid(log_i) if sigmoid else log_i

    forgotten = log_f == -torch.inf
    started = torch.zeros_like(forgotten) if reset is None else reset[:, None].expand_as(forgotten)
    cut = forgotten | started
    segment = cut.cumsum(-1)  # (B, H, T), 0: continues the initial state
    finite = torch.where(forgotten, 0.0, log_f)
    carried = torch.where(cut, 0.0, log_f)  # a cut position's own forget gate acts on nothing

    rows = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    sums = torch.where(rows.tril(-1), carried[..., :, None], 0.0).cumsum(-2)  # sum_{u=s+1..t} l_u
    same = rows & (segment[..., :, None] == segment[..., None, :])
    decay = torch.where(same, sums + log_i[..., None, :], -torch.inf)  # D

    first = segment == 0
    since_start = torch.where(rows & same, torch.where(started, finite, carried)[..., None, :], 0.0).sum(-1)
    if sigmoid:
        m_all = torch.zeros_like(log_f)
        carry_in = since_start
    else:
        # the stabiliser's own path starts at the initial m, at 0 after a reset, nowhere after f = -inf
        open_start = torch.where(cut, started & ~forgotten, False)
        has_start = (open_start[..., None, :] & same).any(-1)
        path = torch.where(first, since_start + m[..., None], torch.where(has_start, since_start, -torch.inf))
        row_max = decay.amax(-1)
        m_all = torch.where(path >= row_max, path, row_max)
        m_all = torch.where(m_all == -torch.inf, 0.0, m_all)
        carry_in = since_start + m[..., None]
    scores = (qs @ kh.transpose(-1, -2)) * (decay - m_all[..., None]).exp()
    carry = torch.where(first, carry_in - m_all, -torch.inf).exp()  # weight of the initial state
    num = scores @ vh + (carry[..., None] * qs) @ c
    if normalize:
        r = scores.sum(-1) + carry * (qs @ n[..., None]).squeeze(-1)
        num = num / (torch.maximum(r.abs(), (-m_all).exp()) + eps)[..., None]
    h = num.transpose(1, 2).to(v.dtype)

    wk = (decay[..., -1, :] - m_all[..., -1:]).exp()[..., None] * kh
    c = carry[..., -1, None, None] * c + wk.transpose(-1, -2) @ vh
    n = carry[..., -1, None] * n + wk.sum(-2)
    return h, c, n, m_all[..., -1]
