"""xLSTMBlockStack: residual mLSTM and sLSTM blocks in any order, from (B, T, E) to (B, T, E).

Source: Beck et al., xLSTM: Extended Long Short-Term Memory, arXiv 2405.04517. Config fields, class names and
state-dict keys are those of the published package.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.blocks import (
    mLSTMBlock,
    mLSTMBlockConfig,
    run_blocks,
    sLSTMBlock,
    sLSTMBlockConfig,
    step_blocks,
)
from openxlstm.layers.norms import LayerNorm
from openxlstm.models.language_model import check_state, check_step_input, state_layout
from openxlstm.models.pattern import resolve_slstm_at
from openxlstm.state import ModelState


@dataclass(frozen=True)
class xLSTMBlockStackConfig:
    """Block stack, with the published fields."""

    mlstm_block: mLSTMBlockConfig | None = None
    """The mLSTM blocks. None with an ``slstm_block`` makes every block an sLSTM; None with neither is the
    default mLSTM block."""
    slstm_block: sLSTMBlockConfig | None = None
    """The sLSTM blocks; None is the default sLSTM block wherever ``slstm_at`` asks for one."""
    context_length: int = -1
    """Published field without effect: any sequence length works, also beyond this one."""
    num_blocks: int = 1
    """Number of blocks."""
    embedding_dim: int = 128
    """Width E of the residual stream."""
    add_post_blocks_norm: bool = True
    """Normalise after the last block."""
    bias: bool = False
    """Biases in the linear maps of the mLSTM blocks."""
    dropout: float = 0.0
    """Dropout in all blocks."""
    slstm_at: list[int] | str = field(default_factory=list)
    """Which blocks are sLSTM: indices from 0, "all", or a ratio of mLSTM to sLSTM like "[7:1]"."""

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, got {self.embedding_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        resolve_slstm_at(self.slstm_at, self.num_blocks)

    @property
    def slstm_positions(self) -> list[int]:
        """Indices of the sLSTM blocks."""
        if self.mlstm_block is None and self.slstm_block is not None:
            return list(range(self.num_blocks))
        return resolve_slstm_at(self.slstm_at, self.num_blocks)

    @property
    def block_map(self) -> list[str]:
        """``"m"`` or ``"s"`` for every block."""
        positions = set(self.slstm_positions)
        return ["s" if index in positions else "m" for index in range(self.num_blocks)]

    @property
    def mlstm_block_config(self) -> mLSTMBlockConfig:
        """``mlstm_block`` with the stack's width, dropout, bias and context length filled in."""
        block = self.mlstm_block or mLSTMBlockConfig()
        layer = dataclasses.replace(
            block.mlstm,
            embedding_dim=self.embedding_dim,
            dropout=self.dropout,
            bias=self.bias,
            context_length=self.context_length,
        )
        return mLSTMBlockConfig(layer)

    @property
    def slstm_block_config(self) -> sLSTMBlockConfig:
        """``slstm_block`` with the stack's width and dropout filled in."""
        block = self.slstm_block or sLSTMBlockConfig()
        feedforward = block.feedforward
        if feedforward is not None:
            feedforward = dataclasses.replace(
                feedforward, embedding_dim=self.embedding_dim, dropout=self.dropout
            )
        layer = dataclasses.replace(block.slstm, embedding_dim=self.embedding_dim, dropout=self.dropout)
        return sLSTMBlockConfig(layer, feedforward)


class xLSTMBlockStack(nn.Module):
    """A stack of xLSTM blocks, usable as the backbone of any sequence model.

    The state can be taken out and put back at any position, and full-sequence and step calls mixed freely.

    Raises:
        ValueError: widths and heads that don't fit together.

    Example:
        >>> stack = xLSTMBlockStack(xLSTMBlockStackConfig(num_blocks=2, embedding_dim=64, slstm_at=[1]))
        >>> y, state = stack(torch.randn(3, 10, 64), return_state=True)
        >>> y_next, state = stack.step(torch.randn(3, 1, 64), state)
    """

    def __init__(self, config: xLSTMBlockStackConfig) -> None:
        super().__init__()
        self.config = config
        count = config.num_blocks
        self.blocks = nn.ModuleList(
            sLSTMBlock(config.slstm_block_config, block_index=index, num_blocks=count)
            if kind == "s"
            else mLSTMBlock(config.mlstm_block_config, num_blocks=count)
            for index, kind in enumerate(config.block_map)
        )
        self.post_blocks_norm = (
            LayerNorm(config.embedding_dim) if config.add_post_blocks_norm else nn.Identity()
        )
        self._state_layout = state_layout(self.initial_state(1, "meta"))

    def forward(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Run a sequence.

        Args:
            x: (B, T, E), any T.
            state: what came before; None is the empty state. It is not changed.
            return_state: also return the state after the last position.
            reset: bool (B, T), True where a new document starts: nothing before it has any influence.

        Returns:
            y (B, T, E), or (y, state).

        Raises:
            ValueError: an input of another width, or a state of another model or batch.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.embedding_dim:
            raise ValueError(
                f"the input must be (batch, time, {self.config.embedding_dim}), got {tuple(x.shape)}"
            )
        check_state(state, self._state_layout, x.shape[0])
        states = None if state is None else state.blocks
        x, states = run_blocks(self.blocks, x, states, return_state=return_state, reset=reset)
        y = self.post_blocks_norm(x)
        return (y, ModelState(states)) if return_state else y

    def step(self, x: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state). ``state=None`` is the empty state."""
        check_step_input(x)
        check_state(state, self._state_layout, x.shape[0])
        x, states = step_blocks(self.blocks, x, None if state is None else state.blocks)
        return self.post_blocks_norm(x), ModelState(states)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros, float32, on ``device`` (default: where the parameters are)."""
        return ModelState(tuple(block.initial_state(batch_size, device) for block in self.blocks))  # pyright: ignore

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the published initial values (the constructor has done so already)."""
        for block in self.blocks:
            block.reset_parameters(generator)  # pyright: ignore
        if isinstance(self.post_blocks_norm, LayerNorm):
            self.post_blocks_norm.reset_parameters()
