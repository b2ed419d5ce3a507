"""Backend ``native`` of the mLSTM over sequences: the chunkwise algorithm in C++, on CPUs.

The mathematics of :mod:`openxlstm.ops.mlstm.chunkwise`, whose saved tensors and gradient formulas it shares;
the scalars of the gates are those of :mod:`openxlstm.ops.mlstm.gates`. One task walks over the chunks of one
head with the state beside the core: every tile of scores, decays and gradients lives in the cache and never
reaches main memory. Results depend neither on the number of threads nor on the rest of the batch, bit for
bit.

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
from openxlstm.ops.native import loader
from openxlstm.ops.native.operands import Operands


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
        *((name, ctypes.c_int32) for name in ("bfloat16", "bfloat16_gates", "sigmoid", "normalize")),
        ("eps", ctypes.c_float),
        *((name, _View) for name in "qkvif"),
        *((name, ctypes.c_void_p) for name in ("reset", "c0", "n0", "m0", "h", "c", "n", "m", "r", "den")),
        ("h_view", _View),
        ("dh", _View),
        *((name, ctypes.c_void_p) for name in ("dc_last", "dn_last", "dm_last")),
        *(
            (name, ctypes.c_void_p)
            for name in ("dq_out", "dk_out", "dv_out", "di", "df", "dc0", "dn0", "dm0")
        ),
    )


def refuse(request: Request) -> str | None:
    """Why the native backend cannot serve a request, or None."""
    return loader.refuse(request, differentiable=True)


class _Call(Operands):
    """The arguments that forward and backward share, and the tensors that must outlive the call."""

    def __init__(
        self,
        operands: tuple[Tensor, Tensor, Tensor],  # q, k, v
        gates: tuple[Tensor, Tensor],  # i, f
        state: tuple[Tensor, Tensor, Tensor],
        reset: Tensor | None,
        options: tuple[bool, bool, float, int],  # sigmoid, normalize, eps, chunk_size
    ) -> None:
        super().__init__()
        q, _, v = operands
        batch, time, heads, qk_dim = q.shape
        sigmoid, normalize, eps, chunk = options
        self.dtype = _dtype(q)
        self.gate_dtype = _dtype(*gates)
        sizes = (batch, time, heads, qk_dim, v.shape[-1], chunk, -(-time // chunk), 1)
        halves = (self.dtype == torch.bfloat16, self.gate_dtype == torch.bfloat16)
        self.arguments = a = _Arguments(*sizes, *halves, sigmoid, normalize, eps)
        a.q, a.k, a.v = (self.view(x) for x in operands)
        a.i, a.f = (
            _View(x.data_ptr(), *x.stride()) for x in (self.hold(g.to(self.gate_dtype)) for g in gates)
        )
        a.reset = self.keep(reset, torch.bool)
        a.m0 = self.keep(state[2], torch.float32)
        if not all(_is_one_zero(x) for x in state[:2]):
            a.c0, a.n0 = (self.keep(x, torch.float32) for x in state[:2])

    def view(self, x: Tensor | None) -> _View:
        """A (B, T, H, D) operand in the dtype of the call, copied only if D does not lie together."""
        return _View(None, 0, 0, 0) if x is None else _View(*self.strided(x, self.dtype))

    def output(self, x: Tensor) -> Tensor:
        """Memory for a result of the shape of x, laid out (B, T, H, D), or (B, T, H) for a gate."""
        return torch.empty(x.shape, dtype=self.dtype if x.ndim == 4 else self.gate_dtype)


def _is_one_zero(x: Tensor) -> bool:
    """Whether a tensor is a single zero seen in every place: the state that nobody gave."""
    apart = any(step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)
    return x.numel() > 0 and not apart and x[(0,) * x.ndim].item() == 0


def _dtype(*tensors: Tensor) -> torch.dtype:
    """What the kernel reads these tensors in."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32


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
    call = _Call((q, k, v), (i, f), (c0, n0, m0), reset, (sigmoid, normalize, eps, chunk_size))
    a, h = call.arguments, call.output(v)
    c, n, m = (torch.empty(x.shape, dtype=torch.float32) for x in (c0, n0, m0))
    r, den = (torch.empty(batch, heads, time) for _ in range(2))
    a.h, a.c, a.n, a.m, a.r, a.den = (x.data_ptr() for x in (h, c, n, m, r, den))
    loader.call("oxl_mlstm_forward", a)
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
    call = _Call((q, k, v), (i, f), (c0, n0, m0), reset, (sigmoid, normalize, eps, chunk_size))
    a = call.arguments
    grads = [call.output(x) for x in (q, k, v, i, f)]
    state_grads = [torch.empty(x.shape, dtype=torch.float32) for x in (c0, n0, m0)]
    a.r, a.den = (call.keep(x) for x in (r, den))
    a.h_view, a.dh = call.view(h), call.view(dh)
    a.dc_last, a.dn_last, a.dm_last = (call.keep(x, torch.float32) for x in (dc_last, dn_last, dm_last))
    a.dq_out, a.dk_out, a.dv_out, a.di, a.df = (x.data_ptr() for x in grads)
    a.dc0, a.dn0, a.dm0 = (x.data_ptr() for x in state_grads)
    loader.call("oxl_mlstm_backward", a)
    dq, dk, dv, di, df = (d.to(x.dtype) for d, x in zip(grads, (q, k, v, i, f), strict=True))
    dc, dn, dm = state_grads
    return dq, dk, dv, di, df, dc, dn, dm


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
