"""Ours: the native decode engine, and prompts as `Generator` reads them.

int8 prompts are read with activations of 8 bits (`Quantization(activation_bits=8)`); decoding keeps them as
they are.
"""

from __future__ import annotations

from typing import Any

import torch

from openxlstm.cli.bench import SIZES, random_model
from openxlstm.inference.measurement import state_bytes, weight_bytes
from openxlstm.inference.runner import ModelRunner
from openxlstm.layers.quantized import QuantizedLinear
from openxlstm.models.accounting import least_prompt_flops
from turns import Work

RATES = {"float32": torch.float32}


class Model:
    """A published size with random weights."""

    def __init__(self, size: str, dtype: str, threads: int) -> None:
        self.model, self.config, self.dtype = random_model(size, dtype), SIZES[size], dtype
        self.runner = ModelRunner(self.model, decode="engine")
        self._states: dict[int, Any] = {0: self.runner.initial_state()}

    def decode(self, context: int, batch: int) -> Work:
        """Steps of the engine after ``context`` tokens that were really read."""
        held: Any = self.runner.hold(self._state(context).fork(batch))
        tokens = [5] * batch
        traffic = weight_bytes(self.model) + 2 * state_bytes(held)
        return Work(lambda: held.engine.step(tokens, held, reuse=True), batch, bytes=traffic)

    def prompt(self, length: int) -> Work:
        """All but the last token in pieces, the last one by the engine, which gives the logits."""
        if self.dtype == "int8":
            for module in self.model.modules():
                if isinstance(module, QuantizedLinear):
                    module.activation_bits = 8
        tokens = _tokens(length)

        def read(tokens: list[int] = tokens) -> None:
            state = self._read(tokens[:-1], self._states[0])
            self.runner.advance(tokens[-1:], self.runner.hold(state), reuse=True)

        read(tokens[:130])
        return Work(
            read,
            length,
            flops=least_prompt_flops(self.config, length),
            rate_dtype=RATES.get(self.dtype, torch.bfloat16),
        )

    def _state(self, context: int) -> Any:
        """The state after ``context`` tokens; goes on from the longest shorter one that is known."""
        known = max(n for n in self._states if n <= context)
        if known < context:
            self._states[context] = self._read(_tokens(context)[known:], self._states[known])
        return self._states[context]

    def _read(self, tokens: list[int], state: Any) -> Any:
        for piece in self.runner.pieces(tokens):
            state = self.runner.read(piece, state)
        return state


def _tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50304, (count,), generator=generator).tolist()
