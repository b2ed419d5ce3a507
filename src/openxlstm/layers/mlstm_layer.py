"""mLSTM layer of the block stack (pre up-projection, NeurIPS 2024).

    [a | z] = W_up x;   a' = SiLU(conv(a));   q = Q a';  k = K a';  v = V a
    i, f = W [q k v] + b;   h = norm_heads(mLSTM(q, k, v, i, f))
    y = W_down( (h + skip * a') * SiLU(z) )

Q, K, V are block-diagonal with small blocks; v does not see the convolution. Parameter names are the
published ones. Source: Beck et al., xLSTM: Extended Long Short-Term Memory, arXiv 2405.04517.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.backends import check_backend, companion_backend, step_backend
from openxlstm.layers.causal_conv import CausalConv1d
from openxlstm.layers.feedforward import check_projection, projected_dim
from openxlstm.layers.initialization import linspace_, small_init_, wang_init_, zero_
from openxlstm.layers.linear import Linear, LinearHeadwise
from openxlstm.layers.norms import MultiHeadLayerNorm
from openxlstm.layers.precision import cast_once
from openxlstm.layers.stateful import with_state
from openxlstm.ops import mlstm, mlstm_initial_state, mlstm_step
from openxlstm.state import LayerState, mLSTMState


@dataclass(frozen=True)
class mLSTMLayerConfig:
    """mLSTM layer, with the published fields."""

    conv1d_kernel_size: int = 4
    """Taps of the causal convolution; 0 leaves convolution and its SiLU out."""
    qkv_proj_blocksize: int = 4
    """Block width of the block-diagonal q, k and v maps."""
    num_heads: int = 4
    """Number of heads; must divide the inner width."""
    proj_factor: float = 2.0
    """Inner width over embedding width, before rounding."""
    embedding_dim: int = -1
    """Width of the residual stream; the stack fills it in."""
    bias: bool = False
    """Biases in the up, down, q, k and v maps; the stack fills it in."""
    dropout: float = 0.0
    """Dropout after the down-projection; the stack fills it in."""
    context_length: int = -1
    """Published field without effect: any sequence length works."""
    round_proj_up_dim_up: bool = True
    """Round the inner width up (else down)."""
    round_proj_up_to_multiple_of: int = 64
    """The inner width is a multiple of this."""
    ops_backend: str = "auto"
    """Backend of the mLSTM operator (``openxlstm.ops.mlstm``), not a published field. ``step`` uses the one
    of this name too; where only whole sequences have it ("chunkwise", "parallel"), it is "auto". The
    convolution has compiled kernels with "auto" and "native" only."""

    def __post_init__(self) -> None:
        check_projection(self.proj_factor, self.round_proj_up_to_multiple_of)
        check_backend("mlstm", self.ops_backend)

    @property
    def inner_embedding_dim(self) -> int:
        """Width I inside the layer."""
        return projected_dim(
            self.embedding_dim, self.proj_factor, self.round_proj_up_to_multiple_of, self.round_proj_up_dim_up
        )


class mLSTMCell(nn.Module):
    """Gates and memory; the layer applies the head norm. q, k, v are (B, T, I), h is (B, T, H, D); the gates
    read all heads of all three."""

    def __init__(self, config: mLSTMLayerConfig) -> None:
        super().__init__()
        inner, self.num_heads = config.inner_embedding_dim, config.num_heads
        self.backend = config.ops_backend
        self.step_backend = step_backend("mlstm_step", config.ops_backend)
        self.igate = Linear(3 * inner, self.num_heads)
        self.fgate = Linear(3 * inner, self.num_heads)
        self.outnorm = MultiHeadLayerNorm(inner)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: mLSTMState | None,
        return_state: bool,
        reset: Tensor | None,
    ) -> tuple[Tensor, Any]:
        i, f, q, k, v = self._heads(q, k, v)
        result = mlstm(
            q, k, v, i, f, state=state, return_state=return_state, reset=reset, backend=self.backend
        )
        return with_state(result, return_state)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: mLSTMState) -> tuple[Tensor, mLSTMState]:
        i, f, q, k, v = (u[:, 0] for u in self._heads(q, k, v))
        h, state = mlstm_step(q, k, v, i, f, state, backend=self.step_backend)
        return h[:, None], state

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        gate_input = cast_once(torch.cat([q, k, v], dim=-1))
        q, k, v = (u.unflatten(-1, (self.num_heads, -1)) for u in (q, k, v))
        return self.igate(gate_input), self.fgate(gate_input), q, k, v

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Gate weights 0, input-gate bias N(0, 0.1), forget-gate bias from 3 to 6 over the heads."""
        zero_(self.igate.weight, self.fgate.weight)
        nn.init.normal_(self.igate.bias, std=0.1, generator=generator)
        linspace_(self.fgate.bias, 3.0, 6.0)
        self.outnorm.reset_parameters()


class mLSTMLayer(nn.Module):
    """mLSTM layer of the block stack, (B, T, E) -> (B, T, E).

    Args:
        config: needs ``embedding_dim``.
        num_blocks: depth of the model, which scales the initial down-projection.

    Raises:
        ValueError: widths, heads or block size that don't fit together.
    """

    def __init__(self, config: mLSTMLayerConfig, *, num_blocks: int = 1) -> None:
        super().__init__()
        self.config = config
        self.num_blocks = num_blocks
        width, inner = config.embedding_dim, config.inner_embedding_dim
        if width < 1:
            raise ValueError(f"embedding_dim must be positive, got {width}")
        if inner < 1:
            raise ValueError(
                f"proj_factor {config.proj_factor} gives an inner width of {inner}; "
                "choose a larger factor or round up"
            )
        if config.num_heads < 1 or inner % config.num_heads:
            raise ValueError(
                f"num_heads {config.num_heads} does not divide the inner width {inner} of the mLSTM "
                f"(embedding_dim {width} x proj_factor {config.proj_factor}, rounded to a multiple of "
                f"{config.round_proj_up_to_multiple_of}); choose a divisor of {inner}"
            )
        if config.qkv_proj_blocksize < 1 or inner % config.qkv_proj_blocksize:
            raise ValueError(
                f"qkv_proj_blocksize {config.qkv_proj_blocksize} does not divide the inner width {inner}; "
                f"choose a divisor of {inner}"
            )
        blocks = inner // config.qkv_proj_blocksize
        self.proj_up = Linear(width, 2 * inner, bias=config.bias)
        self.q_proj = LinearHeadwise(inner, blocks, bias=config.bias)
        self.k_proj = LinearHeadwise(inner, blocks, bias=config.bias)
        self.v_proj = LinearHeadwise(inner, blocks, bias=config.bias)
        self.conv1d = CausalConv1d(
            inner, config.conv1d_kernel_size, backend=companion_backend(config.ops_backend)
        )
        self.mlstm_cell = mLSTMCell(config)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = Linear(inner, width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Run a sequence.

        Args:
            x: (B, T, E).
            state: what came before; None is the empty state.
            return_state: also return the state after the last position.
            reset: bool (B, T), True where a new document starts.

        Returns:
            y (B, T, E), or (y, state).
        """
        conv_state, cell_state = (None, None) if state is None else state
        a, z = self.proj_up(x).chunk(2, dim=-1)
        a_conv, conv_state = self.conv1d(a, conv_state, reset=reset, silu=True)
        h, cell_state = self.mlstm_cell(
            self.q_proj(a_conv), self.k_proj(a_conv), self.v_proj(a), cell_state, return_state, reset
        )
        y = self._output(h, a_conv, z)
        return (y, LayerState(conv_state, cell_state)) if return_state else y

    def step(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        conv_state, cell_state = self.initial_state(x.shape[0], x.device) if state is None else state
        a, z = self.proj_up(x).chunk(2, dim=-1)
        a_conv, conv_state = self.conv1d(a, conv_state, silu=True)
        h, cell_state = self.mlstm_cell.step(
            self.q_proj(a_conv), self.k_proj(a_conv), self.v_proj(a), cell_state
        )
        return self._output(h, a_conv, z), LayerState(conv_state, cell_state)

    def _output(self, h: Tensor, a_conv: Tensor, z: Tensor) -> Tensor:
        y = self.mlstm_cell.outnorm(h, gate=z, skip=a_conv, skip_weight=self.learnable_skip)
        return self.dropout(self.proj_down(y))

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> LayerState:
        """The empty state: zeros."""
        weight = self.proj_up.weight
        head_dim = self.config.inner_embedding_dim // self.config.num_heads
        cell = mlstm_initial_state(
            batch_size,
            self.config.num_heads,
            head_dim,
            head_dim,
            device=weight.device if device is None else device,
            dtype=torch.promote_types(torch.float32, weight.dtype),
        )
        return LayerState(self.conv1d.initial_state(batch_size, cell.c.device), cell)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The published initial values."""
        width = self.config.embedding_dim
        small_init_(self.proj_up.weight, width, generator)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.reset_parameters(width, generator)
        self.conv1d.reset_parameters(generator)
        self.mlstm_cell.reset_parameters(generator)
        nn.init.ones_(self.learnable_skip)
        wang_init_(self.proj_down.weight, width, self.num_blocks, generator)
        zero_(self.proj_up.bias, self.proj_down.bias)
