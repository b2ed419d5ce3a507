"""Classical recurrent language models on the ``rnn`` operator: the baselines of recurrent memory.

    h^0 = embedding[tokens];   h^l = cell(W^l h^(l-1), R^l h^l, b^l);   logits = W_head h^L

One head with a full recurrent matrix, no norms and no residual connections, as in ``nn.LSTM`` and ``nn.GRU``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from openxlstm.models import LanguageModel
from openxlstm.models.language_model import (
    check_state,
    check_step_input,
    check_tokens,
    split_names,
    state_layout,
)
from openxlstm.ops import rnn, rnn_initial_state, rnn_step
from openxlstm.ops.rnn.cells import CELLS
from openxlstm.state import ModelState


@dataclass(frozen=True)
class RecurrentLMConfig:
    """Classical recurrent language model."""

    cell: Literal["lstm", "gru", "elman"]
    """Cell of every layer."""
    vocab_size: int
    """Number of tokens V."""
    embedding_dim: int = 32
    """Width E of embedding and state."""
    num_blocks: int = 1
    """Number of layers."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_dim", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class RecurrentLayer(nn.Module):
    """One layer, (B, T, E) -> (B, T, E)."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        self.cell: Any = cell
        kind = CELLS[cell]
        self.input_weight = nn.Parameter(torch.empty(len(kind.input_gates), width, width))
        self.recurrent_weight = nn.Parameter(torch.empty(len(kind.recurrent_gates), 1, width, width))
        self.bias = nn.Parameter(torch.empty(len(kind.bias_gates), 1, width))
        self.reset_parameters()

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Uniform within 1 / sqrt(E), as ``nn.LSTM`` and ``nn.GRU`` do."""
        bound = 1 / math.sqrt(self.bias.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def _gates(self, x: Tensor) -> Tensor:  # (B, T, E) -> (B, T, G, 1, E)
        return torch.einsum("bte,goe->btgo", x, self.input_weight)[:, :, :, None]

    def forward(self, x: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        h, state = rnn(
            self.cell,
            self._gates(x),
            self.recurrent_weight,
            self.bias,
            state=state,
            return_state=True,
            reset=reset,
        )
        return h[:, :, 0], state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, state = rnn_step(self.cell, self._gates(x)[:, 0], self.recurrent_weight, self.bias, state)
        return h, state


class RecurrentLM(LanguageModel):
    """Classical recurrent language model; called like the other models, with states in and out."""

    config: RecurrentLMConfig

    def __init__(self, config: RecurrentLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_dim
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(RecurrentLayer(config.cell, width) for _ in range(config.num_blocks))
        self.lm_head = nn.Linear(width, config.vocab_size)
        self._state_layout = state_layout(self.initial_state(1, "meta"))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Predict the next token at every position: tokens (B, T) -> logits (B, T, V), or (logits, state)."""
        x, state = self.hidden(tokens, state, return_state=True, reset=reset)
        logits = self.lm_head(x)
        return (logits, state) if return_state else logits

    def hidden(
        self, tokens: Tensor, state: ModelState | None, *, return_state: bool, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Output of the last layer: tokens (B, T) -> ((B, T, E), state)."""
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        x = self.embedding(tokens)
        states = []
        for index, layer in enumerate(self.layers):
            x, new = layer(x, None if state is None else state.blocks[index], reset)
            states.append(new)
        return x, ModelState(tuple(states))

    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one token: tokens (B, 1) -> (logits (B, 1, V), state)."""
        check_step_input(tokens)
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        state = self.initial_state(tokens.shape[0]) if state is None else state
        x, states = self.embedding(tokens), []
        for layer, old in zip(self.layers, state.blocks, strict=True):
            x, new = layer.step(x, old)  # pyright: ignore[reportCallIssue]
            states.append(new)
        return self.lm_head(x), ModelState(tuple(states))

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros."""
        device = self.lm_head.weight.device if device is None else device
        width = self.config.embedding_dim
        return ModelState(
            tuple(rnn_initial_state(self.config.cell, batch_size, 1, width, device) for _ in self.layers)
        )

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """PyTorch's own initial values of the same modules."""
        nn.init.normal_(self.embedding.weight, generator=generator)
        bound = 1 / math.sqrt(self.config.embedding_dim)
        for parameter in self.lm_head.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        for layer in self.layers:
            layer.reset_parameters(generator)  # pyright: ignore[reportCallIssue]

    def weight_decay_split(self) -> tuple[list[str], list[str]]:
        """Matrices decay, but neither the embedding nor recurrent weights."""
        return split_names(
            self.named_parameters(), lambda name, _: name == "lm_head.weight" or name.endswith("input_weight")
        )
