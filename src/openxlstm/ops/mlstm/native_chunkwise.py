"""Backend ``native`` of the mLSTM over sequences: the chunkwise algorithm in C++, on CPUs.

The mathematics of :mod:`openxlstm.ops.mlstm.chunkwise`, whose gate scalars, saved tensors and gradient
formulas it shares. One task walks over the chunks of one head with the state beside the core: every tile of
scores, decays and gradients lives in the cache and never reaches main memory. Results depend neither on the
number of threads nor on the rest of the batch, bit for bit.

Arithmetic is float32, and float16 operands are widened on reading, which is exact. So are those in bfloat16,
unless the processor multiplies bfloat16 itself (instruction set ``avx512_bf16``): then scores, weighed keys
and the states that enter products are rounded to it, sums are float32, and so are gates and the states
themselves.

Not twice differentiable; the backend ``recurrent`` is.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.mlstm import chunkwise
from openxlstm.ops.mlstm.gates import Gates, gradients, prepare
from openxlstm.ops.native import loader


def default_chunk_size(qk_dim: int, v_dim: int, dtype: torch.dtype) -> int:
    """Longer chunks read and write states less often, shorter ones work less inside; both are whole tiles."""
    return 96 if dtype == torch.bfloat16 or qk_dim * v_dim > 65536 else 48


class _View(ctypes.Structure):
    """``View`` of native/kernels.h."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "bth"))


class _Arguments(ctypes.Structure):
    """``Mlstm`` of native/kernels.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "time", "heads", "dk", "dv", "chunk", "chunks", "splits")
        ),
        ("bfloat16", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *((name, _View) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in ("rows", "columns", "segment", "carry_in", "to_state", "keep")),
        *((name, ctypes.c_void_p) for name in ("floor", "c0", "n0", "h", "c", "n", "r", "den")),
        ("h_view", _View),
        ("dh", _View),
        *(
            (name, ctypes.c_void_p)
            for name in ("dc_last", "dn_last", "dq_out", "dk_out", "dv_out", "dc0", "dn0")
        ),
        *((name, ctypes.c_void_p) for name in ("row_flow", "chunk_flow", "first_flow", "di", "path")),
    )


def refuse(request: Request) -> str | None:
    """Why the native backend cannot serve a request, or None."""
    return loader.refuse(request, differentiable=True)


class _Call:
    """The arguments that forward and backward share, and the tensors that must outlive the call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, normalize: bool, eps: float) -> None:
        batch, time, heads, qk_dim = q.shape
        self.dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        self._alive: list[Tensor] = []
        chunks, chunk = gates.rows.shape[-2:]
        sizes = (batch, time, heads, qk_dim, v.shape[-1], chunk, chunks, 1)
        self.arguments = a = _Arguments(*sizes, self.dtype == torch.bfloat16, normalize, eps)
        a.q, a.k, a.v = (self.view(x) for x in (q, k, v))
        a.rows, a.columns = self.keep(gates.rows), self.keep(gates.columns)
        a.segment = self.keep(gates.segment, torch.int32)
        a.carry_in, a.to_state = (
            self.keep(gates.carry_in, torch.float32),
            self.keep(gates.to_state, torch.float32),
        )
        a.keep = self.keep(gates.keep, torch.float32)
        a.floor = self.keep((-gates.m).exp(), torch.float32)

    def keep(self, x: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """Address of a contiguous form of x."""
        if x is None:
            return None
        x = x.to(dtype or x.dtype).contiguous()
        self._alive.append(x)
        return x.data_ptr()

    def view(self, x: Tensor | None) -> _View:
        """A (B, T, H, D) operand in the dtype of the call, copied only if D does not lie together."""
        if x is None:
            return _View(None, 0, 0, 0)
        x = x.to(self.dtype)
        if x.stride(-1) != 1:
            x = x.contiguous()
        self._alive.append(x)
        return _View(x.data_ptr(), *x.stride()[:3])

    def output(self, x: Tensor) -> Tensor:
        """Memory for a result of the shape of x, laid out (B, T, H, D)."""
        return torch.empty(x.shape, dtype=self.dtype)


@torch.library.custom_op("openxlstm::mlstm_native", mutates_args=())
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
    if time == 0 or batch == 0:
        return chunkwise._forward(q, k, v, i, f, c0, n0, m0, reset, sigmoid, normalize, eps, chunk_size)
    gates = prepare(i, f, m0, reset, chunk_size, sigmoid)
    call = _Call(q, k, v, gates, normalize, eps)
    a, h = call.arguments, call.output(v)
    c, n = (torch.empty(x.shape, dtype=torch.float32) for x in (c0, n0))
    r, den = (torch.empty(batch, heads, time) for _ in range(2))
    a.c0, a.n0 = call.keep(c0), call.keep(n0)
    a.h, a.c, a.n, a.r, a.den = (x.data_ptr() for x in (h, c, n, r, den))
    loader.call("oxl_mlstm_forward", a)
    m = gates.m[..., -1].to(m0.dtype).clone(memory_format=torch.contiguous_format)
    return h.to(v.dtype), c, n, m, r, den


@torch.library.custom_op("openxlstm::mlstm_native_backward", mutates_args=())
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
    batch, time = q.shape[:2]
    if time == 0 or batch == 0:
        saved = (q, k, v, i, f, c0, n0, m0, reset, h, r, den, dh, dc_last, dn_last, dm_last)
        return chunkwise._backward(*saved, sigmoid, normalize, eps, chunk_size)
    gates = prepare(i, f, m0, reset, chunk_size, sigmoid)
    call = _Call(q, k, v, gates, normalize, eps)
    a = call.arguments
    dq, dk, dv = (call.output(x) for x in (q, k, v))
    dc, dn = (torch.empty(x.shape, dtype=torch.float32) for x in (c0, n0))
    scalars = (gates.rows, gates.keep, m0, gates.m, gates.m)
    flows = [torch.empty(x.shape, dtype=torch.float64) for x in scalars]
    a.c0, a.n0, a.r, a.den = (call.keep(x) for x in (c0, n0, r, den))
    a.h_view, a.dh = call.view(h), call.view(dh)
    a.dc_last, a.dn_last = call.keep(dc_last), call.keep(dn_last)
    a.dq_out, a.dk_out, a.dv_out, a.dc0, a.dn0 = (x.data_ptr() for x in (dq, dk, dv, dc, dn))
    a.row_flow, a.chunk_flow, a.first_flow, a.di, a.path = (x.data_ptr() for x in flows)
    loader.call("oxl_mlstm_backward", a)
    row_flow, chunk_flow, first_flow, di, path = flows
    last_flow = chunk_flow[..., -1]
    path_end = -last_flow if dm_last is None else dm_last.double() - last_flow
    d_i, d_f, dm = gradients(gates, row_flow, chunk_flow, first_flow, di, path, path_end, i, f, sigmoid)
    dq, dk, dv = (d.to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, d_i.to(i.dtype).contiguous(), d_f.to(f.dtype).contiguous(), dc, dn, dm.to(m0.dtype)


chunkwise.register_gradient("openxlstm::mlstm_native", _forward, _backward)


def native(
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
    size = chunk_size or default_chunk_size(q.shape[-1], v.shape[-1], q.dtype)
    size = max(1, min(size, q.shape[1]))
    h, c, n, m, _, _ = _forward(q, k, v, i, f, c, n, m, reset, sigmoid, normalize, eps, size)
    return h, c, n, m
