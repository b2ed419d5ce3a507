"""TransformerLM: a plain Llama-style Transformer, the baseline beside the recurrent models.

    x = x + Attention(norm(x));   x = x + SwiGLU(norm(x));   logits = W_head norm(x)

Pre-norm RMSNorm, rotary positions, no biases (Touvron et al., Llama 2, arXiv 2307.09288): the architecture of
the Transformers in the xLSTM scaling-law study (arXiv 2510.02228). It trains, generates, saves and evaluates
like the other models; its state is a cache of keys and values that grows with the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.attention import CausalSelfAttention, SwiGLU
from openxlstm.layers.blocks import run_blocks, step_blocks
from openxlstm.layers.initialization import small_init_
from openxlstm.layers.linear import Linear
from openxlstm.layers.norms import RMSNorm
from openxlstm.layers.precision import at_least_float32
from openxlstm.layers.stateful import with_state
from openxlstm.models.language_model import (
    LanguageModel,
    check_state,
    check_step_input,
    check_tokens,
    split_names,
    state_layout,
)
from openxlstm.state import KVCache, ModelState


@dataclass(frozen=True)
class TransformerLMConfig:
    """Llama-style Transformer language model.

    Raises:
        ValueError: a width or a number that is not positive, or heads that do not divide.
    """

    embedding_dim: int
    """Width E of the residual stream."""
    num_heads: int
    """Query heads; must divide E into an even head dimension."""
    num_blocks: int
    """Number of blocks."""
    vocab_size: int
    """Number of tokens V."""
    num_kv_heads: int | None = None
    """Key and value heads, for grouped-query attention; None: as many as query heads."""
    ffn_proj_factor: float = 2.667
    """Feed-forward width over E, rounded down, then up to a multiple, as in the published runs."""
    ffn_round_up_to_multiple_of: int = 64
    """The feed-forward width is a multiple of this."""
    ffn_dim: int | None = None
    """Feed-forward width, if it is not what the factor gives."""
    norm_eps: float = 1e-6
    """Epsilon of all norms."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tie_weights: bool = False
    """Use the embedding as output matrix."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_heads", "num_blocks", "vocab_size", "ffn_round_up_to_multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.embedding_dim % (2 * self.num_heads):
            raise ValueError(
                f"num_heads {self.num_heads} does not divide embedding_dim {self.embedding_dim} into an even "
                "head dimension (rotary positions turn pairs of channels); choose other heads"
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}; "
                "leave it out for one key head per query head"
            )
        if self.ffn_hidden_dim < 1:
            raise ValueError(f"the feed-forward width must be positive, got {self.ffn_hidden_dim}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.embedding_dim // self.num_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Feed-forward width U."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        multiple = self.ffn_round_up_to_multiple_of
        return -(-int(self.embedding_dim * self.ffn_proj_factor) // multiple) * multiple


class TransformerBlock(nn.Module):
    """x = x + Attention(norm(x)); x = x + SwiGLU(norm(x))."""

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.norm_attention = RMSNorm(width, config.norm_eps)
        self.attention = CausalSelfAttention(
            width, config.num_heads, config.kv_heads, config.rope_theta, config.num_blocks
        )
        self.norm_ffn = RMSNorm(width, config.norm_eps)
        self.ffn = SwiGLU(width, config.ffn_hidden_dim, config.num_blocks)

    def forward(
        self,
        x: Tensor,
        state: KVCache | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Run a sequence, (B, T, E) -> (B, T, E); see :meth:`CausalSelfAttention.forward`."""
        result = self.attention(self.norm_attention(x), state, return_state=return_state, reset=reset)
        y, new_state = with_state(result, return_state)
        x = x + y
        x = x + self.ffn(self.norm_ffn(x))
        return (x, new_state) if return_state else x

    def step(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        return self(x, state, return_state=True)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Initial values as in the xLSTM of the same study."""
        self.norm_attention.reset_parameters()
        self.norm_ffn.reset_parameters()
        self.attention.reset_parameters(generator)
        self.ffn.reset_parameters(generator)


class TransformerLM(LanguageModel):
    """Llama-style Transformer language model; called like the recurrent ones.

    Raises:
        ValueError: widths and heads that don't fit together (from the configuration).
    """

    config: TransformerLMConfig

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_blocks))
        self.out_norm = RMSNorm(config.embedding_dim, config.norm_eps)
        self.lm_head = Linear(config.embedding_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.embedding.weight
        self._reset_embedding_and_head(None)
        self._state_layout = state_layout(self.initial_state(1, "meta"))

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
            tokens: int64 (B, T), any T.
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
        """Output of the last norm: tokens (B, T) -> ((B, T, E), state)."""
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        states = None if state is None else state.blocks
        x, states = run_blocks(
            self.blocks, self.embedding(tokens), states, return_state=return_state, reset=reset
        )
        return self.out_norm(x), ModelState(states)

    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one token: tokens (B, 1) -> (logits (B, 1, V), state). Costs grow with the text."""
        check_step_input(tokens)
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        x, states = step_blocks(self.blocks, self.embedding(tokens), None if state is None else state.blocks)
        return at_least_float32(self.lm_head(self.out_norm(x))), ModelState(states)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: caches without positions, on ``device`` (default: where the parameters are)."""
        attentions = (block.attention for block in self.blocks)
        return ModelState(tuple(a.initial_state(batch_size, device) for a in attentions))  # pyright: ignore

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the initial values, from ``generator`` or PyTorch's global generator."""
        for block in self.blocks:
            block.reset_parameters(generator)  # pyright: ignore
        self.out_norm.reset_parameters()
        self._reset_embedding_and_head(generator)

    def _reset_embedding_and_head(self, generator: Generator | None) -> None:
        small_init_(self.embedding.weight, self.config.embedding_dim, generator)
        if not self.config.tie_weights:
            small_init_(self.lm_head.weight, self.config.embedding_dim, generator)

    def weight_decay_split(self) -> tuple[list[str], list[str]]:
        """Decay all matrices but the embedding, as in xLSTMLarge."""
        return split_names(
            self.named_parameters(), lambda name, p: p.ndim >= 2 and not name.startswith("embedding.")
        )
