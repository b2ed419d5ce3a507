"""The chunkwise mLSTM in PyTorch: linear in time, exact gradients, on any device.

Time is cut into chunks of L. Within a chunk the quadratic form, between chunks the recurrence over the state
(C, n); :mod:`gates` has prepared its scalars (W, beta, a-bar, g-bar below). With the state (C, n) entering a
chunk and s = DK^-1/2:

    A = s (Q K^T) * W          num = A V + s beta Q C          r = A 1 + s beta Q n
    den = max(|r|, exp(-m)) + eps                              h = num / den
    C' = g-bar C + (a-bar K)^T V                               n' = g-bar n + (a-bar K)^T 1

The backward (exact; nothing is treated as constant) rebuilds the states, then walks the chunks in reverse
with the state gradient (dC, dn). With y = dh / den and rho = -sign(r) (dh . h) / den where |r| > exp(-m),
else 0:

    dS = s W * (y V^T + rho)
    dQ = dS K + s beta (y C^T + rho n)          dK = dS^T Q + a-bar (V dC'^T + dn')
    dV = A^T y + (a-bar K) dC'
    dC = g-bar dC' + (s beta Q)^T y             dn = g-bar dn' + (s beta Q)^T rho

Nothing of size (T, T) and no per-step state is ever stored; the states between chunks live during the
backward only. Products run in bfloat16 where inputs are bfloat16 and the device multiplies it natively, else
in float32 (float64 for float64 inputs); gates, normaliser and states are float32 at least.

Sources: Tiled Flash Linear Attention (arXiv 2503.14376) for the chunkwise form; derivation in
docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.mlstm.gates import gradients, prepare
from openxlstm.ops.mlstm.workspace import EnteringStates, Workspace


def default_chunk_size(time: int) -> int:
    """Work inside chunks grows with their length, work on states shrinks: 64 is best or near it on CPUs."""
    return max(1, min(64, time))


@torch.library.custom_op("openxlstm::mlstm_chunkwise", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the last c, n, m, and (B, H, T) r and den for the backward."""
    batch, time, heads, _ = q.shape
    h = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    c, n = (x.clone(memory_format=torch.contiguous_format).flatten(0, 1) for x in (c0, n0))
    r = torch.empty(batch, heads, time, dtype=c0.dtype, device=q.device)
    den = torch.empty_like(r)
    if time == 0:
        m = m0.new_zeros(m0.shape) if sigmoid else m0.clone(memory_format=torch.contiguous_format)
        return h, c.view(c0.shape), n.view(n0.shape), m, r, den
    gates = prepare(i, f, m0, reset, chunk_size, sigmoid)
    floor = (-gates.m).exp().to(c0.dtype)
    work = Workspace(q, k, v, c0, chunk_size)
    for chunk in range(work.chunks):
        start, end = work.span(chunk)
        length = end - start
        qs, ks, vs = (work.operand(name, x, chunk) for name, x in (("q", q), ("k", k), ("v", v)))
        scores = (
            work.multiply("scores", qs, ks.transpose(1, 2)).mul_(work.decay(gates, chunk)).mul_(work.scale)
        )
        carried = work.buffer("carried_q", *qs.shape)
        torch.mul(qs, (work.scalars(gates.carry_in, chunk) * work.scale)[..., None], out=carried)
        num = work.multiply("num", work.product(scores), vs)
        work.accumulate(num, work.product(carried), work.product(c))
        num = num.view(batch, heads, length, work.v_dim)
        out = h[:, start:end].transpose(1, 2)
        if normalize:
            row = scores.sum(-1).add_(torch.bmm(carried, n[..., None]).squeeze(-1))
            r[..., start:end] = row.view(batch, heads, length)
            den[..., start:end] = torch.maximum(r[..., start:end].abs(), floor[..., start:end]) + eps
            num.div_(den[..., start:end, None])
        out.copy_(num)
        work.advance(gates, chunk, ks, vs, (c, n), (c, n))
    if not normalize:
        r.zero_()
        den.fill_(1.0)
    return (
        h,
        c.view(c0.shape),
        n.view(n0.shape),
        gates.m[..., -1].to(m0.dtype).clone(memory_format=torch.contiguous_format),
        r,
        den,
    )


@torch.library.custom_op("openxlstm::mlstm_chunkwise_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    h: Tensor,
    r: Tensor,
    den: Tensor,
    dh: Tensor | None,
    dc_last: Tensor | None,
    dn_last: Tensor | None,
    dm_last: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f, c0, n0, m0."""
    batch, time, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dc = c0.new_zeros(c0.shape) if dc_last is None else dc_last.clone(memory_format=torch.contiguous_format)
    dn = n0.new_zeros(n0.shape) if dn_last is None else dn_last.clone(memory_format=torch.contiguous_format)
    if time == 0:
        dm = m0.new_zeros(m0.shape) if dm_last is None or sigmoid else dm_last.clone()
        return dq, dk, dv, torch.zeros_like(i), torch.zeros_like(f), dc, dn, dm
    dc, dn = dc.flatten(0, 1), dn.flatten(0, 1)
    gates = prepare(i, f, m0, reset, chunk_size, sigmoid)
    work = Workspace(q, k, v, c0, chunk_size)
    needs_last = dc_last is not None or dn_last is not None
    states = EnteringStates(work, gates, k, v, c0, n0, last=needs_last)

    wide = gates.m.dtype
    floor = (-gates.m).exp().to(r.dtype)
    path = torch.zeros(batch, heads, time, dtype=wide, device=q.device)
    row_flow = torch.zeros(batch, heads, work.chunks, chunk_size, dtype=wide, device=q.device)
    chunk_flow = torch.zeros(batch, heads, work.chunks, dtype=wide, device=q.device)
    di = torch.empty(batch, heads, time, dtype=wide, device=q.device)

    last_flow = torch.zeros(batch, heads, dtype=wide, device=q.device)
    if needs_last:
        last_flow = _inner(work, *states[work.chunks], dc, dn, wide)
    flow = last_flow
    for chunk in range(work.chunks - 1, -1, -1):
        chunk_flow[..., chunk] = flow
        start, end = work.span(chunk)
        length = end - start
        c, n = states[chunk]
        qs, ks, vs = (work.operand(name, x, chunk) for name, x in (("q", q), ("k", k), ("v", v)))
        tile = work.decay(gates, chunk).mul_(work.scale)
        beta = (work.scalars(gates.carry_in, chunk) * work.scale)[..., None]
        to_state = work.scalars(gates.to_state, chunk)[..., None]
        keep = gates.keep[:, :, chunk].flatten().to(work.dtype)

        weighted = work.buffer("weighted_k", *ks.shape)
        torch.mul(ks, to_state, out=weighted)
        d_value = work.multiply("d_value", work.product(weighted), work.product(dc))
        d_key = work.multiply("d_key", vs, work.product(dc).transpose(1, 2)).add_(dn[:, None]).mul_(to_state)
        if dh is not None:
            y = work.buffer("y", batch, heads, length, work.v_dim)
            torch.div(dh[:, start:end].transpose(1, 2), den[..., start:end, None], out=y)
            rho = torch.zeros(batch, heads, length, dtype=work.dtype, device=q.device)
            if normalize:
                y_h = work.buffer("y_h", *y.shape)
                along = torch.mul(y, h[:, start:end].transpose(1, 2), out=y_h).sum(-1)  # dh . h / den
                inside = r[..., start:end].abs() > floor[..., start:end]
                rho = torch.where(inside, -r[..., start:end].sign() * along, 0.0)
                path[..., start:end] = along.to(wide) * -eps
            rho_rows = rho.flatten(0, 1)[..., None]
            y = work.product(y.flatten(0, 1))
            scores = work.multiply("scores", qs, ks.transpose(1, 2)).mul_(tile)
            work.accumulate(d_value, work.product(scores).transpose(1, 2), y)
            d_scores = work.multiply("d_scores", y, vs.transpose(1, 2)).add_(rho_rows).mul_(tile)
            d_scores = work.product(d_scores)
            d_query = work.multiply("d_query", y, work.product(c).transpose(1, 2))
            d_query.addcmul_(rho_rows, n[:, None]).mul_(beta)
            work.accumulate(d_query, d_scores, ks)
            work.accumulate(d_key, d_scores.transpose(1, 2), qs)
            carried = work.buffer("carried_q", *qs.shape)
            torch.mul(qs, beta, out=carried)
            dc.mul_(keep[:, None, None])
            work.accumulate(dc, work.product(carried).transpose(1, 2), y)
            dn.mul_(keep[:, None]).add_((carried * rho_rows).sum(1))
            outgoing = torch.mul(d_query, qs, out=carried).sum(-1).to(wide)
        else:
            d_query = work.buffer("d_query", *qs.shape).zero_()
            dc.mul_(keep[:, None, None])
            dn.mul_(keep[:, None])
            outgoing = 0.0
        incoming = torch.mul(d_key, ks, out=weighted).sum(-1).to(wide)
        di[..., start:end] = incoming.view(batch, heads, length)
        row_flow[..., chunk, :length] = (outgoing - incoming).view(batch, heads, length)
        for total, part in ((dq, d_query), (dk, d_key), (dv, d_value)):
            total[:, start:end].copy_(part.view(batch, heads, length, total.shape[-1]).transpose(1, 2))
        flow = _inner(work, c, n, dc, dn, wide)

    path_end = -last_flow if dm_last is None else dm_last.to(wide) - last_flow
    d_i, d_f, dm0 = gradients(gates, row_flow, chunk_flow, flow, di, path, path_end, i, f, sigmoid)
    return (
        dq,
        dk,
        dv,
        d_i.to(i.dtype).contiguous(),
        d_f.to(f.dtype).contiguous(),
        dc.view(c0.shape),
        dn.view(n0.shape),
        dm0.to(m0.dtype),
    )


def _inner(work: Workspace, c: Tensor, n: Tensor, dc: Tensor, dn: Tensor, dtype: torch.dtype) -> Tensor:
    """<C, dC> + n . dn per head, (B, H), in the dtype of gate scalars."""
    total = torch.mul(c, dc, out=work.buffer("inner", *c.shape)).sum((1, 2))
    return (total.to(dtype) + (n * dn).sum(-1)).view(work.batch, work.heads)


def register_gradient(name: str, forward: Any, backward: Any, saved: Sequence[int] = (0, 4, 5)) -> None:
    """Make a chunkwise operator compile and differentiate.

    Args:
        name: of the forward operator.
        forward, backward: custom operators with the signatures of this module's; more options may follow.
        saved: which results of the forward the backward takes behind the inputs; h, r and den unless given. A
            result 6 is the stabiliser of every position, (B, H, T) float64.
    """

    @forward.register_fake
    def _(q, k, v, i, f, c0, n0, m0, reset, *_):
        batch, time, heads, _ = q.shape
        h = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        r = c0.new_empty(batch, heads, time)
        more = [r.double()] if 6 in saved else []
        return h, c0.new_empty(c0.shape), n0.new_empty(n0.shape), m0.new_empty(m0.shape), r, r.clone(), *more

    @backward.register_fake
    def _(q, k, v, i, f, c0, n0, m0, *_):
        return tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, i, f, c0, n0, m0)
        )

    def setup_context(ctx, inputs, output) -> None:
        tensors, options = inputs[:9], inputs[9:]
        ctx.save_for_backward(*tensors, *(output[n] for n in saved))
        ctx.options = options
        ctx.set_materialize_grads(False)

    def gradient(ctx, dh, dc, dn, dm, *_):
        grads = backward(*ctx.saved_tensors, dh, dc, dn, dm, *ctx.options)
        return *grads, None, *(None for _ in ctx.options)

    torch.library.register_autograd(name, gradient, setup_context=setup_context)


register_gradient("openxlstm::mlstm_chunkwise", _forward, _backward)


def chunkwise(
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
    """Chunkwise mLSTM; shapes and results as :func:`openxlstm.ops.mlstm.reference.recurrent`."""
    size = chunk_size or default_chunk_size(q.shape[1])
    h, c, n, m, _, _ = _forward(q, k, v, i, f, c, n, m, reset, sigmoid, normalize, eps, size)
    return h, c, n, m
