"""Recurrent state: what a model remembers between calls.

Every state is a tree of ``NamedTuple`` and ``tuple`` nodes whose leaves are tensors with the batch first,
so PyTorch's pytree functions, ``torch.compile`` and ``torch.export`` understand it, and selecting, stacking,
forking, moving or saving any of them is one generic function. States are values: nothing in the package
changes a state that was passed in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from openxlstm.runtime import atomic_write_bytes

TreeT = TypeVar("TreeT")


class mLSTMState(NamedTuple):
    """State of an mLSTM, float32: the memory is ``exp(m) * c``, its normaliser ``exp(m) * n``."""

    c: Tensor
    """Matrix memory, (B, H, DK, DV)."""
    n: Tensor
    """Normaliser, (B, H, DK)."""
    m: Tensor
    """Stabiliser (log scale), (B, H)."""


@dataclass(frozen=True)
class mLSTMSlots:
    """States of an mLSTM that advance in place, in slots; what :func:`openxlstm.ops.mlstm_step` takes and
    gives back where the memory must not move. As a tree of tensors it is its slots."""

    memory: mLSTMState
    """The states of S slots, contiguous."""
    slots: Tensor
    """int32 (B,): the slot of each row, negative for rows to leave alone."""

    def __iter__(self) -> Iterator[Tensor]:
        yield self.slots


class sLSTMState(NamedTuple):
    """State of an sLSTM, float32, each (B, H, D)."""

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class LSTMState(NamedTuple):
    """State of an LSTM, each (B, H, D)."""

    h: Tensor
    c: Tensor


class GRUState(NamedTuple):
    """State of a GRU, (B, H, D)."""

    h: Tensor


class ElmanState(NamedTuple):
    """State of an Elman network, (B, H, D)."""

    h: Tensor


class KVCache(NamedTuple):
    """State of causal attention, which grows with the text. Rows are aligned at their ends."""

    k: Tensor
    """Keys with their positions applied, (B, S, H, D), in the dtype of the computation."""
    v: Tensor
    """Values, (B, S, H, D)."""
    length: Tensor
    """int64 (B,): of the S positions of a row, the last ``length`` count; the others are ignored."""


class LayerState(NamedTuple):
    """State of a layer with a causal convolution before its cell."""

    conv: Tensor
    """The last ``kernel_size - 1`` inputs of the convolution, oldest first, (B, kernel_size - 1, E)."""
    cell: Any
    """State of the cell, such as :class:`mLSTMState`."""


class ModelState(NamedTuple):
    """State of a whole model: one entry per block, each a tree of tensors with the batch first."""

    blocks: tuple[Any, ...]

    @property
    def batch_size(self) -> int:
        """Number of sequences this state belongs to."""
        return leaves(self)[0].shape[0]

    def select(self, index: Tensor | Sequence[int] | int) -> ModelState:
        """Keep the rows ``index`` (any order, repeats allowed); an int keeps one row, batch of 1."""
        return select(self, index)

    def fork(self, copies: int) -> ModelState:
        """Repeat every row ``copies`` times, in place: rows 0, 0, ..., 1, 1, ..."""
        return fork(self, copies)

    def detach(self) -> ModelState:
        """Cut the gradient, for truncated back-propagation through time."""
        return detach(self)

    def clone(self) -> ModelState:
        """Copy every tensor."""
        return map_state(Tensor.clone, self)

    def to(self, device: torch.device | str) -> ModelState:
        """Move to ``device``. The dtype stays as it is."""
        return map_state(lambda t: t.to(device), self)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; see :func:`save_state`."""
        save_state(self, path)

    @staticmethod
    def stack(states: Sequence[ModelState]) -> ModelState:
        """Join several states into one batch, in order."""
        return stack(states)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> ModelState:
        """Read a state that :meth:`save` wrote; see :func:`load_state`."""
        return load_state(path, device)


_NODE_TYPES: dict[str, type] = {
    t.__name__: t
    for t in (mLSTMState, sLSTMState, LSTMState, GRUState, ElmanState, KVCache, LayerState, ModelState)
}


def map_state(function: Callable[[Tensor], Tensor], state: TreeT) -> TreeT:
    """Apply ``function`` to every tensor and rebuild the same tree."""
    if isinstance(state, Tensor):
        return function(state)  # pyright: ignore[reportReturnType]
    parts = [map_state(function, part) for part in state]  # pyright: ignore[reportGeneralTypeIssues]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)  # pyright: ignore


def leaves(state: Any) -> list[Tensor]:
    """All tensors of the tree, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for part in state for leaf in leaves(part)]


def select(state: TreeT, index: Tensor | Sequence[int] | int) -> TreeT:
    """Keep the rows ``index`` of every leaf: an int, several, or a mask of bools.

    Raises:
        IndexError: a row does not exist.
        ValueError: a mask of another length, or something that is no index.
    """
    size = leaves(state)[0].shape[0]
    rows = torch.as_tensor([index] if isinstance(index, int) else index)
    if rows.dtype == torch.bool:
        if rows.shape != (size,):
            raise ValueError(f"a mask must have one entry for each of {size} rows, got {tuple(rows.shape)}")
        rows = rows.nonzero().flatten()
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.ndim != 1):
        raise ValueError(f"rows must be a flat list of integers, got {rows.dtype} {tuple(rows.shape)}")
    rows = rows.long()
    if rows.numel() and (int(rows.min()) < -size or int(rows.max()) >= size):
        raise IndexError(f"state has {size} rows, asked for {rows.tolist()}")
    return map_state(lambda t: t[rows.to(t.device)], state)


def fork(state: TreeT, copies: int) -> TreeT:
    """Repeat every row ``copies`` times, each row's copies side by side."""
    if copies < 0:
        raise ValueError(f"copies must not be negative, got {copies}")
    return map_state(lambda t: t.repeat_interleave(copies, dim=0), state)


def stack(states: Sequence[TreeT]) -> TreeT:
    """Join the batches of several states with the same tree and shapes, in order.

    Caches of different lengths are filled up with zeros at their beginnings.

    Raises:
        ValueError: no states, or states of different models.
    """
    if not states:
        raise ValueError("need at least one state to stack")
    described = [_describe(s) for s in states]
    if any(d != described[0] for d in described[1:]):
        raise ValueError("cannot stack states of different models: their trees differ")
    caches = [_caches(s) for s in states]
    longest = max((cache.k.shape[1] for cache in itertools.chain(*caches)), default=0)
    if any(cache.k.shape[1] != longest for cache in itertools.chain(*caches)):
        states = [_filled_up(s, longest) for s in states]
    columns = [leaves(s) for s in states]
    for column in zip(*columns, strict=True):
        shapes = {tuple(t.shape[1:]) for t in column}
        if len(shapes) > 1:
            raise ValueError(f"cannot stack states of different models: leaf shapes {sorted(shapes)} differ")
    joined = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    return map_state(lambda _: next(joined), states[0])


def _caches(state: Any) -> list[KVCache]:
    """All caches of the tree, in order."""
    if isinstance(state, Tensor):
        return []
    if isinstance(state, KVCache):
        return [state]
    return [cache for part in state for cache in _caches(part)]


def _filled_up(state: Any, size: int) -> Any:
    """The same tree with ``size`` positions in every cache."""
    if isinstance(state, Tensor):
        return state
    if isinstance(state, KVCache):
        missing = (0, 0, 0, 0, size - state.k.shape[1], 0)
        return KVCache(pad(state.k, missing), pad(state.v, missing), state.length)
    parts = [_filled_up(part, size) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def detach(state: TreeT) -> TreeT:
    """Cut the gradient of every leaf."""
    return map_state(Tensor.detach, state)


def _describe(state: Any) -> Any:
    """The tree's structure as JSON: ``"tensor"`` for leaves, ``[node type, children...]`` for nodes."""
    if isinstance(state, Tensor):
        return "tensor"
    return [type(state).__name__, *(_describe(part) for part in state)]


def _rebuild(structure: Any, tensors: list[Tensor]) -> Any:
    if structure == "tensor":
        return tensors.pop(0)
    name, *children = structure
    parts = [_rebuild(child, tensors) for child in children]
    if name == "tuple":
        return tuple(parts)
    return _NODE_TYPES[name](*parts)


def save_state(state: Any, path: str | Path) -> None:
    """Write any state to one safetensors file, atomically (a crash leaves the old file or the new one).

    Raises:
        OSError: the file cannot be written (no such folder, no space left); nothing is left behind.
    """
    from safetensors.torch import save

    tensors = {f"{n:05d}": t.detach().cpu().contiguous().clone() for n, t in enumerate(leaves(state))}
    atomic_write_bytes(path, save(tensors, metadata={"openxlstm_state": json.dumps(_describe(state))}))


def load_state(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read a state written by :func:`save_state`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is not a saved state.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"state file '{path}' does not exist")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = [file.get_tensor(name) for name in sorted(file.keys())]
        structure = json.loads(metadata["openxlstm_state"])
        return _rebuild(structure, tensors)
    except (KeyError, IndexError, json.JSONDecodeError):
        raise ValueError(f"'{path}' is not a saved model state") from None
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable state file: {error}") from None
