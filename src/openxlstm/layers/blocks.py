"""Residual blocks of the block stack, and the loop over blocks that every model shares.

mLSTM block:  x = x + mLSTM(norm(x))
sLSTM block:  x = x + sLSTM(norm(x));   x = x + FFN(norm(x))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.feedforward import FeedForward, FeedForwardConfig
from openxlstm.layers.mlstm_layer import mLSTMLayer, mLSTMLayerConfig
from openxlstm.layers.norms import LayerNorm
from openxlstm.layers.slstm_layer import sLSTMLayer, sLSTMLayerConfig
from openxlstm.layers.stateful import with_state
from openxlstm.state import LayerState


@dataclass(frozen=True)
class mLSTMBlockConfig:
    """mLSTM block, with the published nesting ``mlstm_block.mlstm``."""

    mlstm: mLSTMLayerConfig = field(default_factory=mLSTMLayerConfig)


@dataclass(frozen=True)
class sLSTMBlockConfig:
    """sLSTM block, with the published nesting ``slstm_block.slstm`` and ``slstm_block.feedforward``."""

    slstm: sLSTMLayerConfig = field(default_factory=sLSTMLayerConfig)
    feedforward: FeedForwardConfig | None = field(default_factory=FeedForwardConfig)
    """None leaves the feed-forward out."""


class _Block(nn.Module):
    """Norm, sequence layer, residual; then, where there is one, norm, feed-forward, residual."""

    xlstm_norm: LayerNorm
    xlstm: mLSTMLayer | sLSTMLayer
    ffn_norm: LayerNorm
    ffn: FeedForward | None

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Run a sequence, (B, T, E) -> (B, T, E); see :meth:`openxlstm.layers.mLSTMLayer.forward`."""
        result = self.xlstm(self.xlstm_norm(x), state, return_state=return_state, reset=reset)
        y, new_state = with_state(result, return_state)
        y = self._feedforward(x + y)
        return (y, new_state) if return_state else y

    def step(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        y, state = self.xlstm.step(self.xlstm_norm(x), state)
        return self._feedforward(x + y), state

    def _feedforward(self, x: Tensor) -> Tensor:
        return x if self.ffn is None else x + self.ffn(self.ffn_norm(x))

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> LayerState:
        """The empty state: zeros."""
        return self.xlstm.initial_state(batch_size, device)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The published initial values."""
        self.xlstm_norm.reset_parameters()
        self.xlstm.reset_parameters(generator)
        if self.ffn is not None:
            self.ffn_norm.reset_parameters()
            self.ffn.reset_parameters(generator)


class mLSTMBlock(_Block):
    """x = x + mLSTM(norm(x)). ``config.mlstm.embedding_dim`` must be set."""

    def __init__(self, config: mLSTMBlockConfig, *, num_blocks: int = 1) -> None:
        super().__init__()
        self.config = config
        self.xlstm_norm = LayerNorm(config.mlstm.embedding_dim)
        self.xlstm = mLSTMLayer(config.mlstm, num_blocks=num_blocks)
        self.ffn = None


class sLSTMBlock(_Block):
    """x = x + sLSTM(norm(x)); x = x + FFN(norm(x)). ``config.slstm.embedding_dim`` must be set."""

    def __init__(self, config: sLSTMBlockConfig, *, block_index: int = 0, num_blocks: int = 1) -> None:
        super().__init__()
        self.config = config
        width = config.slstm.embedding_dim
        self.xlstm_norm = LayerNorm(width)
        self.xlstm = sLSTMLayer(config.slstm, block_index=block_index, num_blocks=num_blocks)
        self.ffn = None
        if config.feedforward is not None:
            self.ffn_norm = LayerNorm(width)
            self.ffn = FeedForward(
                dataclasses.replace(config.feedforward, embedding_dim=width), num_blocks=num_blocks
            )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    states: Sequence[Any] | None,
    *,
    return_state: bool,
    reset: Tensor | None,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Run ``x`` (B, T, E) through the blocks in order; the states are empty unless ``return_state``."""
    new_states = []
    for index, block in enumerate(blocks):
        state = None if states is None else states[index]
        result = block(x, state, return_state=return_state, reset=reset)
        if return_state:
            x, state = result
            new_states.append(state)
        else:
            x = result
    return x, tuple(new_states)


def step_blocks(
    blocks: Iterable[nn.Module], x: Tensor, states: Sequence[Any] | None
) -> tuple[Tensor, tuple[Any, ...]]:
    """Advance all blocks by one position, x (B, 1, E)."""
    new_states = []
    for index, block in enumerate(blocks):
        x, state = cast(Any, block).step(x, None if states is None else states[index])
        new_states.append(state)
    return x, tuple(new_states)
