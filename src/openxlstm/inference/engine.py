"""The decode engine: a whole model advances by one token in one native call, on CPUs.

PyTorch costs microseconds per operation and reads weights at half of what memory gives; here Python costs
nothing per layer. Weights are used where they are, float32 or bfloat16; activations, gates, norms and states
are float32. States live in slots, one per sequence, and convert to and from :class:`ModelState` without loss,
so everything that states can do (fork, save, move between programs) stays possible.

A row's logits depend neither on the other rows nor on the number of threads, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.inference import weight_table
from openxlstm.ops.decode import STATE_DTYPES
from openxlstm.ops.native import loader
from openxlstm.state import ModelState, leaves, map_state, mLSTMState


class DecodeEngine:
    """Runs one model's decode steps.

    Args:
        model: an ``xLSTMLarge`` or ``xLSTMLMModel`` on the CPU; evaluation mode is implied. Weights that are
            replaced or changed afterwards need a new engine.
        state_dtype: how matrix memories are kept between tokens: float32, or bfloat16 for half the memory at
            the price of rounding them at every token.

    Attributes:
        states: what the slots hold, batch first.

    Raises:
        ValueError: the engine cannot run this model, see :func:`why_not`; an impossible ``state_dtype``.
    """

    def __init__(self, model: nn.Module, *, state_dtype: torch.dtype = torch.float32) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"the decode engine cannot run this model: {reason}")
        self.state_dtype = state_dtype
        self.fingerprint = fingerprint(model)
        self._program = weight_table.build_program(model, state_dtype)
        self._initial_state: Any = model.initial_state
        self._lock = threading.RLock()  # one step at a time, and none while slots are added
        self._empty = self._new_states(1)
        self.states = self._new_states(0)
        self._free: list[int] = []

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self._program.vocab_size

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
                mine[index] = theirs.to(mine.dtype)
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
            return self._program.step(tokens, held.slots, after.slots), after

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
        self._program.set_states(weight_table.state_arrays(states))

    def _new_states(self, slots: int) -> ModelState:
        # Slots are written to, inside inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            states = map_state(Tensor.contiguous, self._initial_state(slots, "cpu"))
            return states if self.state_dtype == torch.float32 else _rounded(states, self.state_dtype)

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

    def __init__(self, engine: DecodeEngine, slots: list[int]) -> None:
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


def _rounded(states: Any, dtype: torch.dtype) -> Any:
    """The same tree with matrix memories in ``dtype``."""
    if isinstance(states, Tensor):
        return states
    if isinstance(states, mLSTMState):
        return states._replace(c=states.c.to(dtype))
    parts = [_rounded(part, dtype) for part in states]
    return type(states)(*parts) if hasattr(states, "_fields") else tuple(parts)


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight is replaced, moved or written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)


def why_not(model: nn.Module) -> str | None:
    """Why the engine cannot run ``model``, or None if it can.

    Raises:
        ValueError: ``OPENXLSTM_ISA`` names an instruction set this machine lacks.
    """
    return weight_table.why_not(model) or loader.unavailable()
