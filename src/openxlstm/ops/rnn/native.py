"""Backend ``native`` of the recurrent operator: all positions in one call, on CPUs, in float32.

``openxlstm::rnn_native`` keeps the recurrent matrix of a head in the cache while it walks over time, with the
rows of the batch side by side; heads and groups of rows run in parallel and never wait for each other.
Values, buffers and the exact backward pass are those of :mod:`openxlstm.ops.rnn.scan`; without gradients
nothing is kept per position. Results depend neither on the number of threads nor on the rest of the
batch, bit for bit; only the gradients of weight and bias, which PyTorch sums over the batch, do.

Not twice differentiable; the backend ``recurrent`` is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request, needs_grad
from openxlstm.ops.matmul import matmul
from openxlstm.ops.native import loader
from openxlstm.ops.native.operands import Operands
from openxlstm.ops.rnn.cells import CELLS, Cell
from openxlstm.ops.rnn.scan import new_buffers, register_gradient

_NUMBERS = {"slstm": 0, "lstm": 1, "gru": 2, "elman": 3}


class _Arguments(ctypes.Structure):
    """``Rnn`` of native/kernels.h."""

    _fields_ = (
        ("cell", ctypes.c_int32),
        ("floor", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("batch", "time", "heads", "d", "rows_per_task", "row_groups")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_b", "x_t", "x_g", "x_h")),
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "bias", "reset", "state", "h", "last")),
        *((name, ctypes.c_void_p) for name in ("hs", "gates", "memory", "factors")),
        *((name, ctypes.c_int64) for name in ("hs_h", "hs_t", "gates_h", "gates_t", "memory_t", "factors_t")),
        *((name, ctypes.c_void_p) for name in ("d_h", "d_last", "d_gates", "d_state")),
        ("follow_m", ctypes.c_int32),
    )


def refuse(request: Request) -> str | None:
    """Why the native backend cannot serve a request, or None."""
    return loader.refuse(request, differentiable=True)


def native(
    cell: Cell,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Any,
    reset: Tensor | None,
    normalizer_floor: float | None,
) -> tuple[Tensor, Any]:
    """Run ``cell`` over time; arguments and results as for :func:`openxlstm.ops.rnn.reference.recurrent`."""
    first = torch.stack(tuple(state)).transpose(1, 2)  # (S, H, B, D)
    keep = needs_grad(x, weight, bias, first)
    h, last, *_ = _forward(cell.name, x, weight, bias, first, reset, normalizer_floor, keep)
    return h, cell.state_type(*last.transpose(1, 2).unbind(0))


def _arguments(
    cell: str,
    weight: Tensor,
    reset: Tensor | None,
    buffers: tuple[Tensor, ...],
    floor: float | None,
    time: int,
) -> tuple[_Arguments, Operands]:
    """What forward and backward have in common, and what keeps its tensors."""
    hs, gates, memory, factors = buffers
    heads, _, batch, d = hs.shape
    operands = Operands()
    a = _Arguments(cell=_NUMBERS[cell], floor=floor or 0.0, batch=batch, time=time, heads=heads, d=d)
    a.weight = operands.keep(weight.transpose(0, 1))  # (H, G_r, D_out, D_in)
    a.reset = operands.keep(reset)
    a.hs, a.gates, a.memory, a.factors = (b.data_ptr() for b in buffers)
    moves = gates.shape[1] == time and hs.shape[1] == time + 1  # else only one position is kept
    a.hs_h, a.hs_t = hs.stride(0), moves * batch * d
    a.gates_h, a.gates_t = gates.stride(0), moves * batch * gates.shape[3] * d
    a.memory_t = moves * memory.shape[1] * heads * batch * d
    a.factors_t = moves * factors.shape[1] * heads * batch * d
    return a, operands


@torch.library.custom_op("openxlstm::rnn_native", mutates_args=())
def _forward(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    normalizer_floor: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h (B, T, H, D), the last state (S, H, B, D), and hs, gates, memory, factors for the backward pass."""
    batch, time, _, heads, d = x.shape
    x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    buffers = new_buffers(CELLS[cell], x, torch.float32, keep)
    h, last = x.new_empty((batch, time, heads, d)), state.new_empty(state.shape)
    if batch == 0:
        return h, last, *buffers
    a, operands = _arguments(cell, weight, reset, buffers, normalizer_floor, time)
    a.x, (a.x_b, a.x_t, a.x_g, a.x_h, _) = x.data_ptr(), x.stride()
    a.bias, a.state = operands.keep(bias), operands.keep(state)
    a.h, a.last = h.data_ptr(), last.data_ptr()
    loader.call("oxl_rnn_forward", a)
    return h, last, *buffers


@torch.library.custom_op("openxlstm::rnn_native_backward", mutates_args=())
def _backward(
    cell: str,
    d_h: Tensor,
    d_last: Tensor | None,
    weight: Tensor,
    reset: Tensor | None,
    hs: Tensor,
    gates: Tensor,
    memory: Tensor,
    factors: Tensor,
    normalizer_floor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations (H, T, B, G_b, D), the weight and the initial state (S, H, B, D)."""
    heads, time, batch, _, d = gates.shape
    states = len(CELLS[cell].state_type._fields)
    d_gates, d_state = torch.empty_like(gates), gates.new_empty((states, heads, batch, d))
    if batch == 0:
        return d_gates, torch.zeros_like(weight, memory_format=torch.contiguous_format), d_state
    a, operands = _arguments(cell, weight, reset, (hs, gates, memory, factors), normalizer_floor, time)
    a.d_h, a.d_last = operands.keep(d_h), operands.keep(d_last)
    a.d_gates, a.d_state = d_gates.data_ptr(), d_state.data_ptr()
    a.follow_m = d_last is not None or normalizer_floor is not None
    loader.call("oxl_rnn_backward", a)
    before = hs[:, :-1]
    if reset is not None:
        before = before.masked_fill(reset.t().unsqueeze(-1), 0)
    with torch.autocast("cpu", enabled=False):
        d_recurrent = d_gates.flatten(3)[..., : weight.shape[0] * d]
        pairs = zip(d_recurrent.flatten(1, 2).mT, before.flatten(1, 2), strict=True)
        d_weight = torch.stack([matmul(*pair) for pair in pairs])
    return d_gates, d_weight.view(heads, -1, d, d).transpose(0, 1).contiguous(), d_state


register_gradient(_forward, _backward)
