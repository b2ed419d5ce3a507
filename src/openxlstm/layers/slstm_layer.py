"""sLSTM layer of the block stack.

    x' = SiLU(conv(x))
    i~ = W_fgate x'   f~ = W_igate x'   z~ = W_zgate x   o~ = W_ogate x        (block-diagonal per head)
    h = norm_heads(dropout(sLSTM(i~, f~, z~, o~)))

The tensor *named* ``fgate`` feeds the input gate and ``igate`` the forget gate: a slip in the published code
that all published weights carry, so it is kept. Biases live in the cell and are not swapped. There is no
output projection. Source: Beck et al., arXiv 2405.04517.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.backends import check_backend, companion_backend, step_backend
from openxlstm.layers.causal_conv import CausalConv1d
from openxlstm.layers.initialization import linspace_, powerlaw_forget_bias, uniform_, zero_
from openxlstm.layers.linear import LinearHeadwise
from openxlstm.layers.norms import MultiHeadLayerNorm
from openxlstm.layers.stateful import with_state
from openxlstm.ops import rnn, rnn_initial_state, rnn_step
from openxlstm.state import LayerState

GATES = 4  # i, f, z, o


@dataclass(frozen=True)
class sLSTMLayerConfig:
    """sLSTM layer, with the published fields."""

    backend: str = "cuda"
    """Published name of a kernel ("cuda", "vanilla"); a hint without effect here, see ``ops_backend``."""
    function: Literal["slstm", "lstm"] = "slstm"
    """Cell: exponential gating with normaliser, or the plain LSTM with the same gates."""
    num_heads: int = 4
    """Number of heads; must divide ``embedding_dim``. A head's recurrence sees only that head."""
    conv1d_kernel_size: int = 4
    """Taps of the causal convolution before the input and forget gates; 0 leaves it and its SiLU out."""
    group_norm_weight: bool = True
    """Learn a scale per channel in the head norm."""
    bias_init: Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"] = (
        "powerlaw_blockdependent"
    )
    """Initial biases of the cell."""
    recurrent_weight_init: Literal["zeros", "standard"] = "zeros"
    """Initial recurrent weights."""
    gradient_recurrent_cut: bool = False
    """Published switch of the CUDA kernel; must stay False (gradients here are exact)."""
    gradient_recurrent_clipval: float | None = None
    """Published switch of the CUDA kernel; must stay None (gradients here are exact)."""
    forward_clipval: float | None = None
    """Published switch of the CUDA kernel; must stay None."""
    batch_size: int = 8
    """Published kernel hint without effect: any batch size works."""
    dtype: str = "bfloat16"
    """Published kernel hint without effect: the cell computes in float32."""
    dtype_b: str = "float32"
    """Published kernel hint without effect."""
    enable_automatic_mixed_precision: bool = True
    """Published kernel hint without effect: parameters have the module's dtype."""
    embedding_dim: int = -1
    """Width of the residual stream; the stack fills it in."""
    dropout: float = 0.0
    """Dropout on the cell's output, before the norm; the stack fills it in."""
    ops_backend: str = "auto"
    """Backend of the recurrent operator (``openxlstm.ops.rnn``), not a published field. ``step`` uses the one
    of this name too; where only whole sequences have it ("scan", "native"), it is "auto". The
    convolution has compiled kernels with "auto" and "native" only."""

    def __post_init__(self) -> None:
        for name in ("gradient_recurrent_cut", "gradient_recurrent_clipval", "forward_clipval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: values and gradients here are exact; "
                    "leave it out"
                )
        for name, choices in (
            ("function", ("slstm", "lstm")),
            ("bias_init", ("powerlaw_blockdependent", "small_init", "standard", "zeros")),
            ("recurrent_weight_init", ("zeros", "standard")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_backend("rnn", self.ops_backend)


class sLSTMCell(nn.Module):
    """Recurrent weights and biases of the cell, in the published "vanilla" layout.

    ``_recurrent_kernel_`` is (H, 4 D, D) = [head, gate out, in], ``_bias_`` is (4 H D) = [gate, head, d], the
    gates in the order i, f, z, o. The published CUDA backend writes (H, D, 4 D) = [head, in, gate out] and
    biases [head, gate, d] under the same names; such state dicts are known by the shape of the kernel and
    converted on loading.
    """

    def __init__(self, config: sLSTMLayerConfig) -> None:
        super().__init__()
        self.config = config
        self.step_backend = step_backend("rnn_step", config.ops_backend)
        heads, head_dim = config.num_heads, config.embedding_dim // config.num_heads
        self.num_heads, self.head_dim = heads, head_dim
        self._recurrent_kernel_ = nn.Parameter(torch.empty(heads, GATES * head_dim, head_dim))
        self._bias_ = nn.Parameter(torch.empty(GATES * heads * head_dim))

    @property
    def recurrent_weight(self) -> Tensor:
        """R as the operator takes it, (4, H, D_out, D_in)."""
        return self._recurrent_kernel_.unflatten(1, (GATES, self.head_dim)).transpose(0, 1)

    @property
    def bias(self) -> Tensor:
        """b as the operator takes it, (4, H, D)."""
        return self._bias_.view(GATES, self.num_heads, self.head_dim)

    def forward(
        self, x: Tensor, state: Any, return_state: bool, reset: Tensor | None
    ) -> tuple[Tensor, Any]:  # x (B, T, 4, H, D) -> h (B, T, H, D)
        result = rnn(
            self.config.function,
            x,
            self.recurrent_weight,
            self.bias,
            state=state,
            return_state=return_state,
            reset=reset,
            backend=self.config.ops_backend,
        )
        return with_state(result, return_state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # x (B, 1, 4, H, D) -> h (B, 1, H, D)
        h, state = rnn_step(
            self.config.function,
            x[:, 0],
            self.recurrent_weight,
            self.bias,
            state,
            backend=self.step_backend,
        )
        return h[:, None], state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> Any:
        weight = self._recurrent_kernel_
        return rnn_initial_state(
            self.config.function,
            batch_size,
            self.num_heads,
            self.head_dim,
            device=weight.device if device is None else device,
            dtype=torch.promote_types(torch.float32, weight.dtype),
        )

    def reset_parameters(
        self, generator: Generator | None = None, *, block_index: int = 0, num_blocks: int = 1
    ) -> None:
        """The published initial values; the default forget biases depend on the block's depth."""
        bound = 1 / math.sqrt(self.num_heads * self.head_dim)
        if self.config.recurrent_weight_init == "zeros":
            zero_(self._recurrent_kernel_)
        else:
            uniform_(self._recurrent_kernel_, bound, generator)
        if self.config.bias_init == "standard":
            uniform_(self._bias_, bound, generator)
            return
        zero_(self._bias_)
        with torch.no_grad():
            forget = self.bias[1]  # (H, D)
            if self.config.bias_init == "powerlaw_blockdependent":
                forget.copy_(powerlaw_forget_bias(self.head_dim, block_index, num_blocks).expand_as(forget))
            elif self.config.bias_init == "small_init":
                for head in forget:
                    linspace_(head, 3.0, 6.0)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        kernel_key, bias_key = f"{prefix}_recurrent_kernel_", f"{prefix}_bias_"
        heads, dim = self.num_heads, self.head_dim
        kernel, bias = state_dict.get(kernel_key), state_dict.get(bias_key)
        if kernel is not None and tuple(kernel.shape) == (heads, dim, GATES * dim):
            state_dict[kernel_key] = kernel.transpose(1, 2).contiguous()
            if bias is not None and bias.numel() == GATES * heads * dim:
                state_dict[bias_key] = bias.reshape(heads, GATES, dim).transpose(0, 1).reshape(-1)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class sLSTMLayer(nn.Module):
    """sLSTM layer of the block stack, (B, T, E) -> (B, T, E).

    Args:
        config: needs ``embedding_dim``.
        block_index, num_blocks: place in the model, which shapes the initial forget biases.

    Raises:
        ValueError: ``num_heads`` does not divide ``embedding_dim``.
    """

    def __init__(self, config: sLSTMLayerConfig, *, block_index: int = 0, num_blocks: int = 1) -> None:
        super().__init__()
        width = config.embedding_dim
        if width < 1:
            raise ValueError(f"embedding_dim must be positive, got {width}")
        if config.num_heads < 1 or width % config.num_heads:
            raise ValueError(
                f"num_heads {config.num_heads} of the sLSTM does not divide embedding_dim {width}; "
                f"choose a divisor of {width}"
            )
        self.config = config
        self.block_index, self.num_blocks = block_index, num_blocks
        self.conv1d = CausalConv1d(
            width, config.conv1d_kernel_size, backend=companion_backend(config.ops_backend)
        )
        self.fgate = LinearHeadwise(width, config.num_heads)
        self.igate = LinearHeadwise(width, config.num_heads)
        self.zgate = LinearHeadwise(width, config.num_heads)
        self.ogate = LinearHeadwise(width, config.num_heads)
        self.slstm_cell = sLSTMCell(config)
        self.group_norm = MultiHeadLayerNorm(width, affine=config.group_norm_weight)
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
        """Run a sequence; arguments and result as in :meth:`openxlstm.layers.mLSTMLayer.forward`."""
        conv_state, cell_state = (None, None) if state is None else state
        gates, conv_state = self._gates(x, conv_state, reset)
        h, cell_state = self.slstm_cell(gates, cell_state, return_state, reset)
        y = self.group_norm(self.dropout(h))
        return (y, LayerState(conv_state, cell_state)) if return_state else y

    def step(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        conv_state, cell_state = self.initial_state(x.shape[0], x.device) if state is None else state
        gates, conv_state = self._gates(x, conv_state, None)
        h, cell_state = self.slstm_cell.step(gates, cell_state)
        return self.group_norm(self.dropout(h)), LayerState(conv_state, cell_state)

    def _gates(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pre-activations without the recurrent part, (B, T, 4, H, D) in the order i, f, z, o."""
        x_conv, new_state = self.conv1d(x, state, reset=reset, silu=True)
        gates = torch.stack([self.fgate(x_conv), self.igate(x_conv), self.zgate(x), self.ogate(x)], dim=2)
        return gates.unflatten(-1, (self.config.num_heads, -1)), new_state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> LayerState:
        """The empty state: zeros."""
        cell = self.slstm_cell.initial_state(batch_size, device)
        conv = self.conv1d.initial_state(batch_size, cell.h.device)
        return LayerState(conv, cell)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The published initial values."""
        for gate in (self.fgate, self.igate, self.zgate, self.ogate):
            gate.reset_parameters(self.config.embedding_dim, generator)
        self.conv1d.reset_parameters(generator)
        self.slstm_cell.reset_parameters(generator, block_index=self.block_index, num_blocks=self.num_blocks)
        self.group_norm.reset_parameters()
