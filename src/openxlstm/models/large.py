"""xLSTMLarge: the architecture of xLSTM 7B and of the scaling-law models.

    logits = cap30( W_head norm(blocks(embedding[tokens])) )

Source: Beck et al., xLSTM 7B, arXiv 2503.13427. Config fields and state-dict keys are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.backends import check_backend
from openxlstm.layers.blocks import run_blocks, step_blocks
from openxlstm.layers.initialization import small_init_
from openxlstm.layers.large import mLSTMLargeBlock
from openxlstm.layers.linear import Linear
from openxlstm.layers.norms import RMSNorm
from openxlstm.layers.soft_cap import soft_cap
from openxlstm.models.language_model import (
    LanguageModel,
    check_state,
    check_step_input,
    check_tokens,
    split_names,
    state_layout,
)
from openxlstm.state import ModelState


@dataclass(frozen=True)
class xLSTMLargeConfig:
    """xLSTMLarge, with the published fields. Fields that name kernels are hints without effect here."""

    embedding_dim: int
    """Width E of the residual stream."""
    num_heads: int
    """Number of heads; must divide the query/key width and the value width."""
    num_blocks: int
    """Number of blocks."""
    vocab_size: int
    """Number of tokens V."""
    use_bias: bool = False
    """Biases in all linear maps but the head, and in all norms. Gates always have them."""
    norm_eps: float = 1e-6
    """Epsilon of all norms."""
    norm_reduction_force_float32: bool = True
    """Compute norms in float32 whatever the dtype."""
    add_out_norm: bool = True
    """Normalise after the last block."""
    qk_dim_factor: float = 0.5
    """Query/key width of all heads over E."""
    v_dim_factor: float = 1.0
    """Value width of all heads over E."""
    chunkwise_kernel: str = "chunkwise--triton_limit_chunk"
    """Published kernel hint without effect; see ``ops_backend``."""
    sequence_kernel: str = "native_sequence__triton"
    """Published kernel hint without effect."""
    step_kernel: str = "triton"
    """Published kernel hint without effect."""
    mode: str = "train"
    """Published mode without effect: every call works in training and inference."""
    chunk_size: int = 64
    """Published chunk length. Only FLOP accounting reads it; the operator picks its own."""
    return_last_states: bool = False
    """Let ``forward`` return (logits, state) when the call doesn't say."""
    autocast_kernel_dtype: str = "bfloat16"
    """Published kernel hint without effect."""
    eps: float = 1e-6
    """Epsilon of the mLSTM's normaliser."""
    inference_state_dtype: str = "float32"
    """Published hint without effect: states are always float32."""
    ffn_proj_factor: float = 2.6667
    """Feed-forward width over E, before rounding."""
    ffn_round_up_to_multiple_of: int = 64
    """The feed-forward width is a multiple of this."""
    gate_soft_cap: float | None = 15.0
    """Soft cap of the gate pre-activations; None for none."""
    output_logit_soft_cap: float | None = 30.0
    """Soft cap of the logits; None for none."""
    weight_mode: Literal["single", "fused"] = "single"
    """"fused" keeps q, k, v and output gate, both gates, and both up-projections in one matrix each."""
    ffn_dim: int | None = None
    """Feed-forward width, if it is not what the factor gives (the published programs round in three ways);
    not a published field."""
    tie_word_embeddings: bool = False
    """Use the embedding as output matrix (a field of the Hugging Face version)."""
    ops_backend: str = "auto"
    """Backend of the mLSTM operator (``openxlstm.ops.mlstm``), not a published field. ``step`` uses the one
    of this name too; where only whole sequences have it ("chunkwise", "parallel"), it is "auto"."""

    def __post_init__(self) -> None:
        for name in (
            "embedding_dim",
            "num_heads",
            "num_blocks",
            "vocab_size",
            "ffn_round_up_to_multiple_of",
            "chunk_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, width in (("query/key", self.qk_dim), ("value", self.v_dim)):
            if width < 1 or width % self.num_heads:
                raise ValueError(
                    f"num_heads {self.num_heads} does not divide the {name} width {width} "
                    f"(embedding_dim {self.embedding_dim} x factor); choose heads that divide it"
                )
        if self.ffn_hidden_dim < 1:
            raise ValueError(f"the feed-forward width must be positive, got {self.ffn_hidden_dim}")
        if self.weight_mode not in ("single", "fused"):
            raise ValueError(f"weight_mode must be 'single' or 'fused', got {self.weight_mode!r}")
        for name in ("gate_soft_cap", "output_logit_soft_cap"):
            cap = getattr(self, name)
            if cap is not None and cap <= 0:
                raise ValueError(f"{name} must be positive, or None for no cap, got {cap}")
        check_backend("mlstm", self.ops_backend)

    @property
    def qk_dim(self) -> int:
        """Query/key width of all heads together."""
        return int(self.embedding_dim * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Value width of all heads together."""
        return int(self.embedding_dim * self.v_dim_factor)

    @property
    def ffn_hidden_dim(self) -> int:
        """Feed-forward width U: ``ffn_dim``, or the factor rounded up as the published PyTorch code does."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        multiple = self.ffn_round_up_to_multiple_of
        return int((self.embedding_dim * self.ffn_proj_factor + multiple - 1) // multiple) * multiple


class xLSTMLargeBackbone(nn.Module):
    """The residual blocks and the last norm, (B, T, E) -> (B, T, E)."""

    def __init__(self, config: xLSTMLargeConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mLSTMLargeBlock(config) for _ in range(config.num_blocks))
        self.out_norm = (
            RMSNorm(
                config.embedding_dim, config.norm_eps, config.use_bias, config.norm_reduction_force_float32
            )
            if config.add_out_norm
            else nn.Identity()
        )

    def forward(
        self, x: Tensor, state: ModelState | None, *, return_state: bool = False, reset: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        states = None if state is None else state.blocks
        x, states = run_blocks(self.blocks, x, states, return_state=return_state, reset=reset)
        return self.out_norm(x), ModelState(states)

    def step(self, x: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
        x, states = step_blocks(self.blocks, x, None if state is None else state.blocks)
        return self.out_norm(x), ModelState(states)


class xLSTMLarge(LanguageModel):
    """xLSTMLarge language model.

    Unlike the published class, its defaults run, it has initial values (those of the 7B recipe), logits are
    float32 from before the soft cap on, and a state that is passed in is never changed.

    Raises:
        ValueError: widths and heads that don't fit together (from the configuration).
    """

    config: xLSTMLargeConfig

    def __init__(self, config: xLSTMLargeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.backbone = xLSTMLargeBackbone(config)
        self.lm_head = Linear(config.embedding_dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        self._reset_embedding_and_head(None)
        self._state_layout = state_layout(self.initial_state(1, "meta"))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        return_state: bool | None = None,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Predict the next token at every position.

        Args:
            tokens: int64 (B, T), any T.
            state: what came before; None is the empty state. It is not changed.
            return_state: also return the state after the last position; None follows the configuration's
                ``return_last_states``.
            reset: bool (B, T), True where a new document starts.

        Returns:
            float32 logits (B, T, V), or (logits, state).

        Raises:
            ValueError: a token id out of range, or a state of another model or batch.
        """
        return_state = self.config.return_last_states if return_state is None else return_state
        x, new_state = self.hidden(tokens, state, return_state=return_state, reset=reset)
        logits = soft_cap(self.lm_head(x), self.logit_cap)
        return (logits, new_state) if return_state else logits

    @property
    def logit_cap(self) -> float | None:
        """Soft cap of the logits, or None."""
        return self.config.output_logit_soft_cap

    def hidden(
        self, tokens: Tensor, state: ModelState | None, *, return_state: bool, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Output of the backbone: tokens (B, T) -> ((B, T, E), state)."""
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        return self.backbone(self.embedding(tokens), state, return_state=return_state, reset=reset)

    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one token: tokens (B, 1) -> (logits (B, 1, V), state)."""
        check_step_input(tokens)
        check_tokens(tokens, self.vocab_size)
        check_state(state, self._state_layout, tokens.shape[0])
        x, state = self.backbone.step(self.embedding(tokens), state)
        return soft_cap(self.lm_head(x), self.logit_cap), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros, float32, on ``device`` (default: where the parameters are)."""
        blocks = self.backbone.blocks
        return ModelState(tuple(block.initial_state(batch_size, device) for block in blocks))  # pyright: ignore

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the initial values of the 7B recipe, from ``generator`` or PyTorch's global generator."""
        for block in self.backbone.blocks:
            block.reset_parameters(generator)  # pyright: ignore
        if isinstance(self.backbone.out_norm, RMSNorm):
            self.backbone.out_norm.reset_parameters()
        self._reset_embedding_and_head(generator)

    def _reset_embedding_and_head(self, generator: Generator | None) -> None:
        small_init_(self.embedding.weight, self.config.embedding_dim, generator)
        if not self.config.tie_word_embeddings:
            small_init_(self.lm_head.weight, self.config.embedding_dim, generator)

    def weight_decay_split(self) -> tuple[list[str], list[str]]:
        """The rule of the 7B run: decay all matrices, gates and head included, but not the embedding."""
        return split_names(
            self.named_parameters(), lambda name, p: p.ndim >= 2 and not name.startswith("embedding.")
        )
