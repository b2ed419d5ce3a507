"""Backend ``triton`` of the recurrent operator: FlashRNN on GPUs, exact gradients, states in and out.

Up to a head dimension of 128 (:func:`configurations.fused_head_dim`) one launch runs all positions with the
recurrent matrices on the chip. Beyond that matrix products and a pointwise kernel alternate, two launches per
position; capture the call in a CUDA graph to hide them. Products take operands of the dtype of x (float32
ones by PyTorch's float32 matmul precision); accumulation, gates, states and buffers are float32.

Buffers and gradients as in :mod:`openxlstm.ops.rnn.scan`. Not twice differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openxlstm.ops.dispatch import needs_grad
from openxlstm.ops.gpu import configurations
from openxlstm.ops.gpu.support import carried_dtype, kernel, precision, triton_type, unit_stride
from openxlstm.ops.rnn.cells import CELLS, Cell
from openxlstm.ops.rnn.scan import fill_inputs, new_buffers, register_gradient

Buffers = tuple[Tensor, Tensor, Tensor, Tensor]
_NUMBERS = {"slstm": 0, "lstm": 1, "gru": 2, "elman": 3}
ROWS = 16
"""Rows of the batch per program: the least a matrix instruction takes."""


def _mask(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.to(torch.int8).contiguous()


@torch.library.custom_op("openxlstm::rnn_triton", mutates_args=())
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
    fused = d <= configurations.fused_head_dim(x.device, x.dtype)
    buffers = new_buffers(CELLS[cell], x, torch.float32, keep or not fused)
    h, last = x.new_empty((batch, time, heads, d), dtype=torch.float32), state.contiguous().clone()
    if batch == 0:
        return h, last, *_kept(buffers, cell, x, keep)
    x = unit_stride(x)
    width = configurations.tile_of(d) if fused else 64
    options = configurations.rnn(width).options

    def launch(state: Tensor, begin: int, end: int) -> None:
        grid = (heads, -(-batch // ROWS), 1 if fused else -(-d // width))
        kernel("rnn.triton_cells", "forward_kernel")[grid](
            x, matrices, biases, starts, state, last, h, *buffers, begin, end, time, batch, heads, d,
            normalizer_floor or 0.0, *x.stride()[:4],
            CELL=_NUMBERS[cell], FUSED=fused, KEEP=keep or not fused,
            HAS_FLOOR=normalizer_floor is not None, PRODUCT=triton_type(x.dtype), BB=ROWS, BD=width,
            PRECISION=precision(x.dtype), **options,
        )  # fmt: skip

    matrices, biases = weight.contiguous(), None if bias is None else bias.contiguous()
    starts = _mask(reset)
    if fused:
        launch(last, 0, time)
        return h, last, *buffers
    gates = buffers[1]
    fill_inputs(CELLS[cell], gates, x, bias)
    columns = weight.transpose(0, 1).flatten(1, 2).mT  # (H, D_in, G_r * D_out)
    recurrent = gates.flatten(3)[..., : columns.shape[2]]
    for t in range(time):
        before = last[0] if reset is None else last[0].masked_fill(reset[:, t, None], 0)
        recurrent[:, t].baddbmm_(before, columns)
        launch(last, t, t + 1)
    return h, last, *_kept(buffers, cell, x, keep)


def _kept(buffers: Buffers, cell: str, x: Tensor, keep: bool) -> Buffers:
    """What is returned for the backward pass: without one, blocks of one position as promised."""
    return buffers if keep else new_buffers(CELLS[cell], x, torch.float32, keep=False)


@torch.library.custom_op("openxlstm::rnn_triton_backward", mutates_args=())
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
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations (H, T, B, G_b, D), the weight and the initial state (S, H, B, D)."""
    heads, time, batch, _, d = gates.shape
    leaves = len(CELLS[cell].state_type._fields)
    d_gates = torch.empty_like(gates)
    d_state = gates.new_zeros((leaves, heads, batch, d))
    if d_last is not None:
        d_state.copy_(d_last)
    if batch == 0:
        return d_gates, torch.zeros_like(weight, memory_format=torch.contiguous_format), d_state
    fused = d <= configurations.fused_head_dim(gates.device, product)
    width = configurations.tile_of(d) if fused else 64
    options = configurations.rnn(width).options
    d_h, starts, matrices = d_h.float().contiguous(), _mask(reset), weight.contiguous()
    operand = carried_dtype(product)

    def launch(begin: int, end: int) -> None:
        grid = (heads, -(-batch // ROWS), 1 if fused else -(-d // width))
        kernel("rnn.triton_cells", "backward_kernel")[grid](
            matrices, starts, hs, gates, memory, factors, d_h, d_state, d_gates,
            begin, end, time, batch, heads, d, normalizer_floor or 0.0,
            CELL=_NUMBERS[cell], FUSED=fused, HAS_FLOOR=normalizer_floor is not None,
            PRODUCT=triton_type(operand), BB=ROWS, BD=width, PRECISION=precision(product), **options,
        )  # fmt: skip

    rows = weight.transpose(0, 1).flatten(1, 2)  # (H, G_r * D_out, D_in)
    d_recurrent = d_gates.flatten(3)[..., : rows.shape[1]]
    if fused:
        launch(0, time)
    else:
        for t in reversed(range(time)):
            launch(t, t + 1)
            through = d_recurrent[:, t]
            if reset is not None:
                through = through.masked_fill(reset[:, t, None], 0)
            d_state[0].baddbmm_(through, rows)
    before = hs[:, :-1]
    if reset is not None:
        before = before.masked_fill(reset.t().unsqueeze(-1), 0)
    with torch.autocast(gates.device.type, enabled=False):
        d_weight = torch.bmm(d_recurrent.flatten(1, 2).mT, before.flatten(1, 2))
    return d_gates, d_weight.view(heads, -1, d, d).transpose(0, 1).contiguous(), d_state


register_gradient(_forward, _backward, typed=True)


def run(
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


def step(
    cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, state: Any, normalizer_floor: float | None
) -> Any:
    """One position x (B, G, H, D); arguments as for :func:`openxlstm.ops.rnn.reference.step`."""
    return run(cell, x.unsqueeze(1), weight, bias, state, None, normalizer_floor)[1]
