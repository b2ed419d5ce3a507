"""Backend ``triton`` of :func:`openxlstm.ops.mlstm_step` and :func:`openxlstm.ops.mlstm_advance`.

Two launches whatever the batch, no synchronisation, static shapes: a decode step can be captured in a CUDA
graph. No gradient; the backend ``recurrent`` has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.gpu import configurations, support
from openxlstm.ops.gpu.support import kernel, unit_stride

MAX_TOKENS = 32
"""Tokens per launch; more are taken in turns."""


def refuse(request: Request) -> str | None:
    """Why the step kernels cannot serve a request, or None."""
    if request.options.get("needs_grad"):
        return "has no backward pass"
    return support.refuse(request)


def _launch(
    inputs: tuple[Tensor, ...],
    before: tuple[Tensor, ...],
    after: tuple[Tensor, ...],
    slots: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> Tensor:
    """h (B, T, H, DV) of T <= MAX_TOKENS tokens; states from ``before`` into ``after``, even in place."""
    q, k, v, i, f = inputs
    q, k, v = (unit_stride(x) for x in (q, k, v))
    batch, time, heads, dk = q.shape
    dv, scale = v.shape[-1], dk**-0.5
    h = v.new_empty(v.shape)
    if h.numel() == 0:
        return h
    kept, added, inverse = (q.new_empty((batch, heads, time), dtype=torch.float32) for _ in range(3))
    wide = configurations.tile_of(dk)
    kernel("mlstm.triton_step", "step_scalars_kernel")[(batch * heads,)](
        q, k, i, f, before[1], before[2], after[1], after[2], slots, kept, added, inverse, eps, scale,
        time, heads, dk, *(s for x in (q, k, i, f) for s in x.stride()[:3]),
        SIGMOID=sigmoid, NORMALIZE=normalize, BK=wide, **configurations.Tiles(warps=1).options,
    )  # fmt: skip
    tiles = configurations.step(q.device).cut(time, dk, dv)
    kernel("mlstm.triton_step", "step_memory_kernel")[(batch * heads, -(-dv // tiles.v))](
        q, k, v, before[0], after[0], slots, kept, added, inverse, h, scale,
        time, heads, dk, dv, *(s for x in (q, k, v) for s in x.stride()[:3]),
        BT=configurations.power_of_two(time), BK=tiles.k, BV=tiles.v, **tiles.options,
    )  # fmt: skip
    return h


@torch.library.custom_op("openxlstm::mlstm_step_triton", mutates_args=())
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (B, H, DV) and the new c, n, m."""
    before = c.contiguous(), n.contiguous(), m.contiguous()
    after = c.new_empty(c.shape), n.new_empty(n.shape), m.new_empty(m.shape)
    h = _launch(tuple(x.unsqueeze(1) for x in (q, k, v, i, f)), before, after, None, sigmoid, normalize, eps)
    return h.squeeze(1), *after


@_step.register_fake
def _(q, k, v, i, f, c, n, m, sigmoid, normalize, eps):
    return v.new_empty(v.shape), c.new_empty(c.shape), n.new_empty(n.shape), m.new_empty(m.shape)


@torch.library.custom_op("openxlstm::mlstm_advance_triton", mutates_args=("c", "n", "m"))
def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    slots: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> Tensor:
    """h (B, T, H, DV); the states (S, ...) of ``slots`` advance in place."""
    inputs, state, pieces = (q, k, v, i, f), (c, n, m), []
    for start in range(0, max(q.shape[1], 1), MAX_TOKENS):
        part = tuple(x[:, start : start + MAX_TOKENS] for x in inputs)
        pieces.append(_launch(part, state, state, slots, sigmoid, normalize, eps))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


@_advance.register_fake
def _(q, k, v, i, f, c, n, m, slots, sigmoid, normalize, eps):
    return v.new_empty(v.shape)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token; arguments and results as for :func:`openxlstm.ops.mlstm.reference.step`."""
    return _step(q, k, v, i, f, c, n, m, sigmoid, normalize, eps)


def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    slots: Tensor | None,
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> Tensor:
    """A few tokens in place; see :func:`openxlstm.ops.mlstm_advance`."""
    return _advance(q, k, v, i, f, c, n, m, slots, sigmoid, normalize, eps)
