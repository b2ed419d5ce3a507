"""Backend ``scan``: a loop over time with few operations per step and an exact hand-written backward pass.

``openxlstm::rnn_scan`` is one custom op, so autograd records one node however long the sequence is, and
``torch.compile`` sees one call. Each forward step is one batched matrix product, added in place onto the
prepared input, and the operations of :mod:`openxlstm.ops.rnn.scan_cells`. The backward pass walks back over
time only for what is recurrent, ``dh[t-1] = R^T dp[t]``; the gradients of weight and bias are one matrix
product and one sum over all positions afterwards.

A reset clears the state of its rows exactly, and the gradient on the way back: no value, not even NaN,
crosses a boundary. Rows of a batch share no arithmetic, so what one row contains never changes another.

Not twice differentiable; the backend ``recurrent`` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from openxlstm.ops.rnn.cells import CELLS, Cell
from openxlstm.ops.rnn.scan_cells import STEPS, ElmanSteps, by_time

_BLOCK_ELEMENTS = 32768
"""Size of one coefficient of a backward block: a few dozen of them fit the second-level cache."""

_ONE_THREAD_FLOPS = 4e6
"""Matrix products of a step up to this size are faster on one thread: waking a second costs more."""

_QUIET_LENGTH = 256
"""Positions per call when no gradient is recorded, so that nothing is kept for a backward pass."""


def scan(
    cell: Cell,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Any,
    reset: Tensor | None,
    normalizer_floor: float | None,
) -> tuple[Tensor, Any]:
    """Run ``cell`` over time; arguments and results as for :func:`openxlstm.ops.rnn.reference.recurrent`."""
    last = torch.stack(tuple(state)).transpose(1, 2)  # (S, H, B, D)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        h, last, *_ = _forward(cell.name, x, weight, bias, last, reset, normalizer_floor)
    else:
        pieces = []
        for begin in range(0, x.shape[1], _QUIET_LENGTH):
            here = slice(begin, begin + _QUIET_LENGTH)
            resets = None if reset is None else reset[:, here]
            h, last, *_ = _forward(cell.name, x[:, here], weight, bias, last, resets, normalizer_floor)
            pieces.append(h)
        h = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    return h, cell.state_type(*last.transpose(1, 2).unbind(0))


def new_buffers(
    cell: Cell, x: Tensor, dtype: torch.dtype, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty hs, gates, memory and factors for a run over x (B, T, G, H, D): of all positions, or of one."""
    batch, time, _, heads, d = x.shape
    steps = STEPS[cell.name]
    after, during = (time + 1, time) if keep else (1, 1)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    return (
        empty(heads, after, batch, d),
        empty(heads, during, batch, len(cell.bias_gates), d),
        empty(after, steps.memory_slots, heads, batch, d),
        empty(during, steps.factor_slots, heads, batch, d),
    )


def _matrices(weight: Tensor) -> Tensor:
    """Recurrent weight (G_r, H, D_out, D_in) as one matrix per head, (H, G_r * D_out, D_in)."""
    return weight.transpose(0, 1).reshape(weight.shape[1], -1, weight.shape[3])


@contextmanager
def _step_threads(weight: Tensor, batch: int) -> Iterator[None]:
    """Run the small products of a loop over time on one thread, then restore the number of threads."""
    threads = torch.get_num_threads()
    if weight.device.type != "cpu" or threads == 1 or 2 * batch * weight.numel() > _ONE_THREAD_FLOPS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _drops(reset: Tensor | None, time: int) -> list[Tensor | None]:
    """For each position the rows that start empty there, (B, 1), or None when there are none."""
    if reset is None:
        return [None] * time
    rows = reset.t().unsqueeze(-1).unbind(0)
    return [row if some else None for row, some in zip(rows, reset.any(0).tolist(), strict=True)]


def fill_inputs(cell: Cell, gates: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Write input and bias into gates (H, T, B, G_b, D): the pre-activations but for the recurrent part."""
    first = gates.shape[3] - x.shape[2]  # slots before it have no input (the GRU's g)
    inputs = x.permute(3, 1, 0, 2, 4)
    if bias is None:
        gates[:, :, :, :first] = 0
        gates[:, :, :, first:] = inputs
    else:
        bias = bias.transpose(0, 1)[:, None, None]
        gates[:, :, :, :first] = bias[:, :, :, :first]
        torch.add(inputs, bias[:, :, :, first:], out=gates[:, :, :, first:])


@torch.library.custom_op("openxlstm::rnn_scan", mutates_args=())
def _forward(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    normalizer_floor: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h (B, T, H, D), the last state (S, H, B, D), and hs, gates, memory, factors for the backward pass."""
    kind = CELLS[cell]
    with torch.autocast(x.device.type, enabled=False):
        hs, gates, memory, factors = new_buffers(kind, x, weight.dtype)
        fill_inputs(kind, gates, x, bias)
        hs[:, 0] = state[0]
        matrices = _matrices(weight).mT  # (H, D_in, G_r * D_out)
        recurrent = gates.flatten(3)[..., : matrices.shape[2]].unbind(1)
        steps = STEPS[cell](gates, hs, memory, factors, normalizer_floor)
        steps.start(state)
        with _step_threads(weight, x.shape[0]):
            for t, drop in enumerate(_drops(reset, x.shape[1])):
                h = steps.h[t] if drop is None else steps.h[t].masked_fill(drop, 0)
                recurrent[t].baddbmm_(h, matrices)
                steps.forward(t, h, drop)
        last = torch.stack([steps.h[-1], *steps.last()])
        h = hs[:, 1:].permute(2, 1, 0, 3).clone(memory_format=torch.contiguous_format)
        return h, last, hs, gates, memory, factors


def _walk_back(
    steps: ElmanSteps,
    d_hs: Tensor,
    d_last: Tensor | None,
    d_recurrent: Tensor,
    matrices: Tensor,
    rows: Tensor | None,
    drops: list[Tensor | None],
) -> Tensor:
    """Fill ``d_recurrent`` (H, T, B, G_r * D) from the end to the start; the gradient of the first h.

    d_hs (B, T, H, D), matrices (H, G_r * D_out, D_in), rows (T, B, 1) the resets, drops those by position.
    """
    heads, time, batch, _ = d_recurrent.shape
    block = max(1, _BLOCK_ELEMENTS // max(1, heads * batch * d_hs.shape[3]))
    d_p = d_recurrent.unbind(1)
    direct = None if d_last is None else d_last[0]  # what reaches h from the next position directly
    through: Tensor | None = None  # and through the recurrent weight
    for end in range(time, 0, -block):
        begin = max(0, end - block)
        steps.prepare(begin, end, None if rows is None else rows[begin:end])
        upstream = d_hs[:, begin:end].permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
        for t, d_h in zip(reversed(range(begin, end)), reversed(upstream.unbind(0)), strict=True):
            if direct is not None:
                d_h.add_(direct)
            if through is not None:
                d_h.baddbmm_(through, matrices)
            drop = drops[t]
            direct, through = steps.backward(t, t - begin, d_h, drop), d_p[t]
            if drop is not None:
                direct = None if direct is None else direct.masked_fill(drop, 0)
                through = through.masked_fill(drop, 0)
    d_first = torch.bmm(d_p[0] if through is None else through, matrices)
    return d_first if direct is None else d_first + direct


@torch.library.custom_op("openxlstm::rnn_scan_backward", mutates_args=())
def _backward(
    cell: str,
    d_hs: Tensor,
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
    with torch.autocast(hs.device.type, enabled=False):
        heads, time, batch, _, d = gates.shape
        matrices = _matrices(weight)
        d_gates = torch.empty_like(gates)
        d_recurrent = d_gates.flatten(3)[..., : matrices.shape[1]]
        h_before, rows = hs[:, :-1], None  # (H, T, B, D), (T, B, 1)
        if reset is not None:
            rows = reset.t().unsqueeze(-1)
            h_before = h_before.masked_fill(rows, 0)
        steps = STEPS[cell](gates, hs, memory, factors, normalizer_floor)
        steps.start_backward(d_gates, d_last, by_time(h_before))
        with _step_threads(weight, batch):
            d_first = _walk_back(steps, d_hs, d_last, d_recurrent, matrices, rows, _drops(reset, time))
        d_weight = torch.bmm(d_recurrent.flatten(1, 2).mT, h_before.flatten(1, 2))
        d_weight = d_weight.view(heads, -1, d, d).transpose(0, 1).contiguous()
        return d_gates, d_weight, torch.stack([d_first, *steps.first_gradients()])


def _forward_shapes(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    normalizer_floor: float | None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, _, heads, d = x.shape
    h = x.new_empty((batch, time, heads, d), dtype=weight.dtype)
    return h, state.new_empty(state.shape), *new_buffers(CELLS[cell], x, weight.dtype, keep)


def _backward_shapes(
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
    product: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, _, batch, _, d = gates.shape
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    d_state = gates.new_empty((len(CELLS[cell].state_type._fields), heads, batch, d))
    return torch.empty_like(gates), d_weight, d_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cell, x, weight, bias, _, reset, floor, *options = inputs
    ctx.save_for_backward(weight, reset, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.floor, ctx.x_dtype, ctx.gates = cell, floor, x.dtype, x.shape[2]
    ctx.has_bias, ctx.options = bias is not None, len(options)


def register_gradient(forward: CustomOpDef, backward: CustomOpDef, *, typed: bool = False) -> None:
    """Tell PyTorch the shapes of both operators (arguments as above; forward may add ``keep``) and that one
    is the gradient of the other. A ``typed`` backward also takes the dtype of x."""

    def differentiate(ctx: Any, d_h: Tensor | None, d_last: Tensor | None, *_: None) -> tuple[Any, ...]:
        weight, reset, hs, gates, memory, factors = ctx.saved_tensors
        if d_h is None:
            heads, time, batch, _, d = gates.shape
            d_h = gates.new_zeros((batch, time, heads, d))
        product = (ctx.x_dtype,) if typed else ()
        d_gates, d_weight, d_state = backward(
            ctx.cell, d_h, d_last, weight, reset, hs, gates, memory, factors, ctx.floor, *product
        )
        d_x = d_gates[:, :, :, gates.shape[3] - ctx.gates :].permute(2, 1, 3, 0, 4).to(ctx.x_dtype)
        d_bias = d_gates.sum((1, 2)).transpose(0, 1) if ctx.has_bias else None
        return None, d_x, d_weight, d_bias, d_state, None, None, *[None] * ctx.options

    forward.register_fake(_forward_shapes)
    backward.register_fake(_backward_shapes)
    forward.register_autograd(differentiate, setup_context=_setup_context)


register_gradient(_forward, _backward)
