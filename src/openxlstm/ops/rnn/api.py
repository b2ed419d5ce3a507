"""The recurrent operator: signature, documentation, every check, and the choice of backend."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from openxlstm.config import nearest_name
from openxlstm.ops import dispatch
from openxlstm.ops.gpu import support
from openxlstm.ops.packing import check_boundaries
from openxlstm.ops.rnn import native, reference, scan, triton_backend
from openxlstm.ops.rnn.cells import CELLS, Cell
from openxlstm.ops.rnn.documents import run_documents
from openxlstm.state import ElmanState, GRUState, LSTMState, map_state, sLSTMState

CellName = Literal["slstm", "lstm", "gru", "elman"]
RNNState = sLSTMState | LSTMState | GRUState | ElmanState

dispatch.register(
    "rnn",
    "scan",
    scan.scan,
    priority=10,
    description="portable PyTorch, few operations per step, exact hand-written backward",
)
dispatch.register(
    "rnn",
    "native",
    native.native,
    priority=20,
    refuse=native.refuse,
    description="C++, the recurrent matrix stays in the cache, exact hand-written backward",
)
dispatch.register(
    "rnn", "recurrent", reference.recurrent, priority=0, description="the definition, a loop autograd follows"
)
dispatch.register(
    "rnn",
    "triton",
    triton_backend.run,
    priority=30,
    refuse=support.refuse,
    automatic=support.automatic,
    description="GPU kernels, recurrent matrices on the chip up to a head dimension of 128",
)
dispatch.register(
    "rnn_step",
    "triton",
    triton_backend.step,
    priority=30,
    refuse=support.refuse,
    automatic=support.automatic,
    description="GPU kernels, one launch per token up to a head dimension of 128",
)
dispatch.register(
    "rnn_step", "recurrent", reference.step, priority=10, description="the definition, one token"
)


def rnn_initial_state(
    cell: CellName,
    batch: int,
    heads: int,
    head_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The empty state of ``cell``: zeros of shape (B, H, D), m included.

    ``dtype`` is float32, or float64 for float64 inputs. Raises ``ValueError`` for an unknown cell.
    """
    state_type = _cell(cell).state_type
    return state_type(
        *(torch.zeros(batch, heads, head_dim, device=device, dtype=dtype) for _ in state_type._fields)
    )


@overload
def rnn(
    cell: CellName,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: RNNState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    normalizer_floor: float | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def rnn(
    cell: CellName,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: RNNState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    normalizer_floor: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]: ...


def rnn(
    cell: CellName,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: RNNState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    normalizer_floor: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Any]:
    """A recurrent network over whole sequences, each head its own small network (FlashRNN, arXiv 2412.07752).

    The equations stand in :mod:`openxlstm.ops.rnn.cells`. Gradients of every input are exact: through the
    normaliser, the stabiliser, the initial state and the returned state.

    Args:
        cell: ``"slstm"``, ``"lstm"``, ``"gru"`` or ``"elman"``.
        x: input part of the gate pre-activations, without recurrence and bias, (B, T, G, H, D), any strides,
            any floating dtype; computed in float32 (float64 for float64). Gate order i, f, z, o for sLSTM and
            LSTM, r, z, n for the GRU, one gate for Elman.
        weight: recurrent weight (G, H, D_out, D_in); gates g, r, z for the GRU.
        bias: (G, H, D) or None; gates g, r, z, n for the GRU.
        state: state to start from, leaves (B, H, D); None is the empty state. It is not changed. An sLSTM
            treats elements with ``n == 0`` as empty (their c must be 0 too); n is never negative.
        return_state: also return the state after the last position.
        cu_seqlens: int32 offsets (N + 1,) of N documents laid end to end in a batch of 1 (empty ones
            allowed); states then have leading dimension N.
        reset: bool (B, T), True where a position starts a new document from the empty state. A row's
            ``state`` acts up to its first reset. Give this or ``cu_seqlens``.
        normalizer_floor: sLSTM only. None is the convention of the xLSTM package (gates clamped to at most
            1); a positive number, 1.0 for FlashRNN, keeps the normaliser ``n`` at least that large too. After
            any step from the empty state ``n >= 1`` holds anyway; 1.0 matters only for states made by hand.
        backend: ``"auto"`` or a name; see :func:`openxlstm.ops.explain`. ``"recurrent"`` can be
            differentiated more than once.

    Returns:
        h (B, T, H, D) in the dtype of x; with ``return_state`` also the state after the last position, of the
        type of the cell, float32 (float64 for float64 x).

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown cell or backend, or an option the
            cell does not have.
    """
    kind = _cell(cell)
    if x.ndim != 5:
        raise ValueError(f"x must have shape (B, T, G, H, D), got {tuple(x.shape)}")
    batch, time, _, heads, d = x.shape
    _check_parameters(kind, x, weight, bias, normalizer_floor)
    check_boundaries(cu_seqlens, reset, x)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = _compute_dtype(x)
    if state is None:
        state = rnn_initial_state(cell, sequences, heads, d, x.device, dtype)
    else:
        _check_state(kind, state, (sequences, heads, d), dtype, x.device)
    request = dispatch.Request(x.device, x.dtype, {"cell": cell, "normalizer_floor": normalizer_floor})
    run = dispatch.resolve("rnn", backend, request).implementation
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if time == 0:
        h, last = x.new_zeros(batch, 0, heads, d), map_state(torch.clone, state)
    elif cu_seqlens is not None:
        h, last = run_documents(run, kind, x, weight, bias, state, cu_seqlens, normalizer_floor)
    else:
        h, last = run(kind, x, weight, bias, state, reset, normalizer_floor)
    h = h.to(x.dtype)
    return (h, last) if return_state else h


def rnn_step(
    cell: CellName,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: RNNState,
    *,
    normalizer_floor: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """One position of the recurrent network, in constant time and memory.

    Args:
        cell: as for :func:`rnn`.
        x: gate pre-activations of one position (B, G, H, D).
        weight, bias: as for :func:`rnn`.
        state: the state before this position, leaves (B, H, D); it is not changed.
        normalizer_floor, backend: as for :func:`rnn`.

    Returns:
        h (B, H, D) in the dtype of x, and the state after this position.

    Raises:
        ValueError: as for :func:`rnn`.
    """
    kind = _cell(cell)
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, G, H, D) for one position, got {tuple(x.shape)}")
    _check_parameters(kind, x.unsqueeze(1), weight, bias, normalizer_floor)
    dtype = _compute_dtype(x)
    batch, _, heads, d = x.shape
    _check_state(kind, state, (batch, heads, d), dtype, x.device)
    request = dispatch.Request(x.device, x.dtype, {"cell": cell, "normalizer_floor": normalizer_floor})
    run = dispatch.resolve("rnn_step", backend, request).implementation
    bias = None if bias is None else bias.to(dtype)
    state = run(kind, x, weight.to(dtype), bias, state, normalizer_floor)
    return state.h.to(x.dtype), state


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cell(name: str) -> Cell:
    if name not in CELLS:
        raise ValueError(
            f"unknown cell '{name}'.{nearest_name(name, CELLS)} Choose one of: {', '.join(CELLS)}"
        )
    return CELLS[name]


def _check_parameters(
    cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, normalizer_floor: float | None
) -> None:
    """Check x (B, T, G, H, D), the parameters and the options against the cell."""
    _, _, gates, heads, d = x.shape
    if gates != len(cell.input_gates):
        raise ValueError(
            f"x of cell '{cell.name}' must have {len(cell.input_gates)} gates "
            f"({', '.join(cell.input_gates)}) in dimension -3, got {gates} in shape {tuple(x.shape)}"
        )
    if heads == 0 or d == 0:
        raise ValueError(f"x must have at least one head of at least one dimension, got {tuple(x.shape)}")
    expected = {
        "weight": (weight, (len(cell.recurrent_gates), heads, d, d), cell.recurrent_gates),
        "bias": (bias, (len(cell.bias_gates), heads, d), cell.bias_gates),
    }
    for name, (tensor, shape, letters) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of cell '{cell.name}' must have shape {shape} (gates {', '.join(letters)} first), "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if normalizer_floor is None:
        return
    if cell.name != "slstm":
        raise ValueError(f"normalizer_floor belongs to cell 'slstm'; leave it None for cell '{cell.name}'")
    if not (normalizer_floor > 0 and math.isfinite(normalizer_floor)):
        raise ValueError(f"normalizer_floor must be None or a positive number, got {normalizer_floor}")


def _check_state(
    cell: Cell, state: Any, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    fields = cell.state_type._fields
    if len(state) != len(fields):
        raise ValueError(
            f"state of cell '{cell.name}' must be {cell.state_type.__name__}({', '.join(fields)}), "
            f"got {len(state)} tensors"
        )
    for name, leaf in zip(fields, state, strict=True):
        if tuple(leaf.shape) != shape:
            raise ValueError(f"state.{name} must have shape (B, H, D) = {shape}, got {tuple(leaf.shape)}")
        if leaf.dtype != dtype:
            raise ValueError(f"state.{name} must be {dtype} for these inputs, got {leaf.dtype}")
        if leaf.device != device:
            raise ValueError(f"state.{name} is on {leaf.device}, x on {device}: move them to one device")
