"""xLSTMLMModel: the block stack as a language model. logits = W_head stack(embedding[tokens])."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import small_init_
from openxlstm.layers.linear import Linear
from openxlstm.layers.precision import at_least_float32
from openxlstm.layers.stateful import with_state
from openxlstm.models.block_stack import xLSTMBlockStack, xLSTMBlockStackConfig
from openxlstm.models.language_model import LanguageModel, check_step_input, check_tokens, split_names
from openxlstm.state import ModelState


@dataclass(frozen=True)
class xLSTMLMModelConfig(xLSTMBlockStackConfig):
    """Language model on a block stack, with the published fields."""

    vocab_size: int = -1
    """Number of tokens V; must be set."""
    tie_weights: bool = False
    """Use the embedding as output matrix."""
    weight_decay_on_embedding: bool = False
    """Apply weight decay to the embedding too."""
    add_embedding_dropout: bool = False
    """Apply ``dropout`` to the embeddings."""


class xLSTMLMModel(LanguageModel):
    """Language model on a block stack.

    Unlike the published class, the constructor draws the published initial values itself (leaving that to the
    caller made tied models diverge), ``forward`` takes and returns state, and logits are float32.

    Raises:
        ValueError: no vocabulary size, or widths and heads that don't fit together.
    """

    config: xLSTMLMModelConfig

    def __init__(self, config: xLSTMLMModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(
                f"vocab_size must be set to the number of tokens of the tokenizer, got {config.vocab_size}"
            )
        self.config = config
        self.xlstm_block_stack = xLSTMBlockStack(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.emb_dropout = nn.Dropout(config.dropout) if config.add_embedding_dropout else nn.Identity()
        self.lm_head = Linear(config.embedding_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        self._reset_embedding_and_head(None)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Predict the next token at every position.

        Args:
            tokens: int64 (B, T).
            state: what came before; None is the empty state. It is not changed.
            return_state: also return the state after the last position.
            reset: bool (B, T), True where a new document starts.

        Returns:
            float32 logits (B, T, V), or (logits, state).

        Raises:
            ValueError: a token id out of range, or a state of another model or batch.
        """
        x, new_state = self.hidden(tokens, state, return_state=return_state, reset=reset)
        logits = at_least_float32(self.lm_head(x))
        return (logits, new_state) if return_state else logits

    def hidden(
        self, tokens: Tensor, state: ModelState | None, *, return_state: bool, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Output of the block stack: tokens (B, T) -> ((B, T, E), state)."""
        check_tokens(tokens, self.vocab_size)
        x = self.emb_dropout(self.token_embedding(tokens))
        result = self.xlstm_block_stack(x, state, return_state=return_state, reset=reset)
        return with_state(result, return_state)

    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one token: tokens (B, 1) -> (logits (B, 1, V), state)."""
        check_step_input(tokens)
        check_tokens(tokens, self.vocab_size)
        x, state = self.xlstm_block_stack.step(self.emb_dropout(self.token_embedding(tokens)), state)
        return at_least_float32(self.lm_head(x)), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros, float32, on ``device`` (default: where the parameters are)."""
        return self.xlstm_block_stack.initial_state(batch_size, device)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the published initial values, from ``generator`` or PyTorch's global generator."""
        self.xlstm_block_stack.reset_parameters(generator)
        self._reset_embedding_and_head(generator)

    def _reset_embedding_and_head(self, generator: Generator | None) -> None:
        small_init_(self.token_embedding.weight, self.config.embedding_dim, generator)
        if not self.config.tie_weights:
            small_init_(self.lm_head.weight, self.config.embedding_dim, generator)

    def weight_decay_split(self) -> tuple[list[str], list[str]]:
        """The published rule: decay what has "weight" and not "norm" in its name, so neither biases nor
        recurrent weights; the embedding only with ``weight_decay_on_embedding``."""

        def decays(name: str, _: Tensor) -> bool:
            if name == "token_embedding.weight":
                return self.config.weight_decay_on_embedding
            return "weight" in name and "norm" not in name

        return split_names(self.named_parameters(), decays)
