"""States of many sequences in slots, and engines that advance them by one token in place.

Two engines share this: :mod:`engine` (CPUs, one native call per token) and :mod:`graph_engine` (GPUs, one
CUDA graph per token). Slots convert to and from :class:`ModelState` without loss, so everything that states
can do (fork, save, move between programs) stays possible.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.state import ModelState, leaves, map_state


class SlotEngine(abc.ABC):
    """A model's decode steps over slots. Weights that are replaced or changed need a new engine.

    Attributes:
        fingerprint: changes when a weight does.
        states: what the slots hold, batch first.
    """

    vocab_size: int
    """Number of logits."""

    def __init__(self, model: nn.Module) -> None:
        self.fingerprint = fingerprint(model)
        self._lock = threading.RLock()  # one step at a time, and none while slots are added
        self._empty = self._new_states(1)
        self.states = self._new_states(0)
        self._free: list[int] = []

    @abc.abstractmethod
    def _new_states(self, slots: int) -> ModelState:
        """Empty states of ``slots`` slots, contiguous."""

    @abc.abstractmethod
    def _moved(self) -> None:
        """The states have a new place in memory."""

    @abc.abstractmethod
    def _step(self, tokens: Sequence[int], before: list[int], after: list[int]) -> Tensor:
        """Logits (B, V); the states of the slots ``before`` advanced, in the slots ``after``."""

    @property
    def slots(self) -> int:
        """Number of slots there are, free or not."""
        return leaves(self.states)[0].shape[0]

    def open(self, state: ModelState | None = None, *, rows: int = 1) -> HeldState:
        """Put the rows of ``state`` (or ``rows`` empty states) into slots.

        Raises:
            ValueError: the state of another model.
        """
        shapes = [t.shape[1:] for t in leaves(self._empty)]
        if state is not None and [t.shape[1:] for t in leaves(state)] != shapes:
            raise ValueError("the state belongs to another model: its shapes differ from this model's")
        values = self._empty if state is None else state
        count = rows if state is None else leaves(state)[0].shape[0]
        held = HeldState(self, self._take(count))
        index = torch.tensor(held.slots)
        with self._lock, torch.no_grad():
            for mine, theirs in zip(leaves(self.states), leaves(values), strict=True):
                mine[index.to(mine.device)] = theirs.to(mine)
        return held

    def step(self, tokens: Sequence[int], held: HeldState, *, reuse: bool) -> tuple[Tensor, HeldState]:
        """Advance every row by its token.

        Args:
            tokens: one per row.
            held: the rows' states.
            reuse: update ``held`` in place and return it; else it stays as it is.

        Returns:
            float32 logits (B, V) of the next tokens, and the states after ``tokens``.

        Raises:
            ValueError: a token that the model does not have, or another number of tokens than rows.
        """
        if held.engine is not self:
            raise ValueError("the state is held by another engine; pass held.state() to open()")
        if len(tokens) != len(held.slots):
            raise ValueError(f"got {len(tokens)} tokens for {len(held.slots)} sequences")
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is out of range for a vocabulary of {self.vocab_size} "
                    f"(0 to {self.vocab_size - 1})"
                )
        with self._lock:
            after = held if reuse else HeldState(self, self._take(len(tokens)))
            return self._step(tokens, held.slots, after.slots), after

    def _take(self, count: int) -> list[int]:
        """Numbers of slots that nobody uses."""
        with self._lock:
            missing = count - len(self._free)
            if missing > 0:
                self._grow(self.slots + max(missing, self.slots // 2))
            return [self._free.pop() for _ in range(count)]

    def _grow(self, slots: int) -> None:
        states = self._new_states(slots)
        for new, old in zip(leaves(states), leaves(self.states), strict=True):
            new[: old.shape[0]] = old
        self._free += range(slots - 1, self.slots - 1, -1)
        self.states = states
        self._moved()

    def read(self, slots: Sequence[int]) -> ModelState:
        """A copy of what the slots hold, float32."""
        with self._lock:
            return map_state(Tensor.float, self.states.select(slots))

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free += slots


class HeldState:
    """States of some sequences in slots of an engine, which it gives back when it is no longer referenced.

    Attributes:
        engine: whose slots they are.
        slots: their numbers, one per sequence.
    """

    def __init__(self, engine: SlotEngine, slots: list[int]) -> None:
        self.engine, self.slots = engine, slots

    def state(self) -> ModelState:
        """A copy as a value."""
        return self.engine.read(self.slots)

    def select(self, rows: Sequence[int]) -> HeldState:
        """Keep only ``rows``, in that order, each at most once; the others' slots are given back."""
        kept = HeldState(self.engine, [self.slots[row] for row in rows])
        self.engine.free([slot for row, slot in enumerate(self.slots) if row not in set(rows)])
        self.slots = []
        return kept

    def __del__(self) -> None:
        self.engine.free(self.slots)


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight is replaced, moved or written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, whatever mode the caller left the model in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
