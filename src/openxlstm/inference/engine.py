"""The decode engine: a whole model advances by one token in one native call, on CPUs.

PyTorch costs microseconds per operation and reads weights at half of what memory gives; here Python costs
nothing per layer. Weights are used where they are, float32 or bfloat16; activations, gates, norms and states
are float32. States live in slots (:mod:`slots`).

A row's logits depend neither on the other rows nor on the number of threads, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.inference import weight_table
from openxlstm.inference.slots import SlotEngine
from openxlstm.ops.decode import STATE_DTYPES
from openxlstm.ops.native import loader
from openxlstm.state import ModelState, map_state, mLSTMState


class DecodeEngine(SlotEngine):
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
        self._program = weight_table.build_program(model, state_dtype)
        self.vocab_size = self._program.vocab_size
        self._initial_state: Any = model.initial_state
        super().__init__(model)

    def _new_states(self, slots: int) -> ModelState:
        # Slots are written to, inside inference mode or not.
        with torch.inference_mode(False), torch.no_grad():
            states = map_state(Tensor.contiguous, self._initial_state(slots, "cpu"))
            return states if self.state_dtype == torch.float32 else _rounded(states, self.state_dtype)

    def _moved(self) -> None:
        self._program.set_states(weight_table.state_arrays(self.states))

    def _step(self, tokens: Sequence[int], before: list[int], after: list[int]) -> Tensor:
        return self._program.step(tokens, before, after)


def _rounded(states: Any, dtype: torch.dtype) -> Any:
    """The same tree with matrix memories in ``dtype``."""
    if isinstance(states, Tensor):
        return states
    if isinstance(states, mLSTMState):
        return states._replace(c=states.c.to(dtype))
    parts = [_rounded(part, dtype) for part in states]
    return type(states)(*parts) if hasattr(states, "_fields") else tuple(parts)


def why_not(model: nn.Module) -> str | None:
    """Why the engine cannot run ``model``, or None if it can.

    Raises:
        ValueError: ``OPENXLSTM_ISA`` names an instruction set this machine lacks.
    """
    return weight_table.why_not(model) or loader.unavailable()
