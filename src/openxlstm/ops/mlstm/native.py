"""Backend ``native`` of one mLSTM token: the whole step in one sweep over the memory, on CPUs, in float32.

``openxlstm::mlstm_step_native`` computes what :func:`openxlstm.ops.mlstm.reference.step` does: decay,
rank-one update and readout together, so C is read and written once. Its result depends neither on the number
of threads nor on the rest of the batch, bit for bit. It has no gradient; the backend ``recurrent`` has.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import loader


class _Arguments(ctypes.Structure):
    """``MlstmStep`` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "i", "f", "c", "n", "m")),
        *((name, ctypes.c_void_p) for name in ("h", "c_out", "n_out", "m_out")),
        *((name, ctypes.c_int64) for name in ("pairs", "dk", "dv", "splits")),
        ("sigmoid", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


def refuse(request: Request) -> str | None:
    """Why the native step cannot serve a request, or None."""
    return loader.refuse(request, differentiable=False)


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
    h, c, n, m = _step(q, k, v, i, f, c, n, m, sigmoid, normalize, eps)
    return h.to(v.dtype), c, n, m


@torch.library.custom_op("openxlstm::mlstm_step_native", mutates_args=())
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
    """h (B, H, DV) in float32, and the new c, n, m."""
    inputs = [x.float().contiguous() for x in (q, k, v, i, f, c, n, m)]
    outputs = [torch.empty(x.shape, dtype=torch.float32) for x in (v, c, n, m)]
    batch, heads, qk_dim = q.shape
    if batch * heads and v.shape[-1]:
        pointers = [x.data_ptr() for x in (*inputs, *outputs)]
        sizes = (batch * heads, qk_dim, v.shape[-1], 1)
        loader.call("oxl_mlstm_step", _Arguments(*pointers, *sizes, sigmoid, normalize, eps))
    return outputs[0], outputs[1], outputs[2], outputs[3]


@_step.register_fake
def _(
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
    h = v.new_empty(v.shape, dtype=torch.float32)
    return h, c.new_empty(c.shape), n.new_empty(n.shape), m.new_empty(m.shape)
