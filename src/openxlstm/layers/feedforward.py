"""Gated feed-forward of the sLSTM block: y = W_down( act(gate) * up ), [gate | up] = W_up x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import small_init_, wang_init_, zero_
from openxlstm.layers.linear import Linear

ActivationName = Literal["gelu", "relu", "relu^2", "sigmoid", "swish", "selu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu^2": lambda x: F.relu(x).square(),
    "sigmoid": F.sigmoid,
    "swish": F.silu,
    "selu": F.selu,
}


def projected_dim(embedding_dim: int, factor: float, multiple_of: int, round_up: bool = True) -> int:
    """``factor * embedding_dim``, rounded to a multiple of ``multiple_of`` (up, or else down)."""
    count = factor * embedding_dim / multiple_of
    return (math.ceil(count) if round_up else math.floor(count)) * multiple_of


def check_projection(proj_factor: float, round_proj_up_to_multiple_of: int) -> None:
    """Refuse what gives no width.

    Raises:
        ValueError: a factor that is not positive and finite, or a multiple below 1.
    """
    if not 0 < proj_factor < math.inf:
        raise ValueError(f"proj_factor must be a positive number, got {proj_factor}")
    if round_proj_up_to_multiple_of < 1:
        raise ValueError(
            f"round_proj_up_to_multiple_of must be at least 1 (1 rounds to whole numbers), "
            f"got {round_proj_up_to_multiple_of}"
        )


@dataclass(frozen=True)
class FeedForwardConfig:
    """Gated feed-forward, with the published fields."""

    proj_factor: float = 1.3
    """Hidden width over embedding width, before rounding (the paper says 4/3, the published code 1.3)."""
    act_fn: ActivationName = "gelu"
    """Activation of the gate."""
    embedding_dim: int = -1
    """Width of the residual stream; the stack fills it in."""
    dropout: float = 0.0
    """Dropout after the down-projection; the stack fills it in."""
    bias: bool = False
    """Biases in both projections."""
    ff_type: Literal["ffn_gated"] = "ffn_gated"
    """Only the gated form exists."""
    round_proj_up_dim_up: bool = True
    """Round the hidden width up (else down)."""
    round_proj_up_to_multiple_of: int = 64
    """The hidden width is a multiple of this."""

    def __post_init__(self) -> None:
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {self.act_fn!r}")
        check_projection(self.proj_factor, self.round_proj_up_to_multiple_of)

    @property
    def proj_up_dim(self) -> int:
        """Hidden width U."""
        return projected_dim(
            self.embedding_dim, self.proj_factor, self.round_proj_up_to_multiple_of, self.round_proj_up_dim_up
        )


class FeedForward(nn.Module):
    """Gated feed-forward, (B, T, E) -> (B, T, E). ``proj_up.weight`` (2U, E) holds the gate's rows first."""

    def __init__(self, config: FeedForwardConfig, *, num_blocks: int = 1) -> None:
        super().__init__()
        if config.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, got {config.embedding_dim}")
        if config.proj_up_dim < 1:
            raise ValueError(
                f"proj_factor {config.proj_factor} gives a hidden width of {config.proj_up_dim}; "
                "choose a larger factor or round up"
            )
        self.config = config
        self.num_blocks = num_blocks
        self.proj_up = Linear(config.embedding_dim, 2 * config.proj_up_dim, bias=config.bias)
        self.proj_down = Linear(config.proj_up_dim, config.embedding_dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_up(x).chunk(2, dim=-1)
        return self.dropout(self.proj_down(ACTIVATIONS[self.config.act_fn](gate) * up))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Small init up, Wang init down, biases 0."""
        small_init_(self.proj_up.weight, self.config.embedding_dim, generator)
        wang_init_(self.proj_down.weight, self.config.embedding_dim, self.num_blocks, generator)
        zero_(self.proj_up.bias, self.proj_down.bias)
