"""Depthwise causal convolution of the block stack: the parameters of the operator ``causal_convolution``.

In the published code the states of the full-sequence form (K - 1 rows) and of the step form (K rows) are
incompatible; here there is one, the last K - 1 inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import uniform_
from openxlstm.layers.precision import at_least_float32
from openxlstm.ops import causal_convolution


class CausalConv1d(nn.Module):
    """Depthwise causal convolution over time; ``kernel_size=0`` is the identity without parameters.

    Args:
        embedding_dim: number of channels E.
        kernel_size: taps K, including the current input.
        bias: add a bias per channel.
        backend: of :func:`openxlstm.ops.causal_convolution`.

    Raises:
        ValueError: negative kernel size.
    """

    conv: nn.Conv1d | None

    def __init__(
        self, embedding_dim: int, kernel_size: int = 4, bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        if kernel_size < 0:
            raise ValueError(
                f"conv1d_kernel_size must be 0 (no convolution) or positive, got {kernel_size}; "
                "the published value is 4"
            )
        self.embedding_dim = embedding_dim
        self.kernel_size = kernel_size
        self.backend = backend
        # Only the parameters of this module are used: `conv.weight` (E, 1, K) and `conv.bias` (E).
        self.conv = (
            nn.Conv1d(embedding_dim, embedding_dim, kernel_size, groups=embedding_dim, bias=bias)
            if kernel_size > 0
            else None
        )

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> Tensor:
        """The empty state: zeros (B, max(K - 1, 0), E), float32 (float64 for float64 weights)."""
        dtype = torch.float32
        if self.conv is not None:
            device = self.conv.weight.device if device is None else device
            dtype = torch.promote_types(dtype, self.conv.weight.dtype)
        return torch.zeros(
            batch_size, max(self.kernel_size - 1, 0), self.embedding_dim, device=device, dtype=dtype
        )

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None, silu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x``.

        Args:
            x: (B, T, E).
            state: what came before, (B, K - 1, E); None is zeros.
            reset: bool (B, T), True where a new document starts.
            silu: apply SiLU to the result; without a convolution there is none.

        Returns:
            y (B, T, E) in the dtype of ``x``, and the new state (B, K - 1, E).

        Raises:
            ValueError: ``state`` of another shape, or ``reset`` of another shape or dtype.
        """
        if self.conv is None:
            return x, at_least_float32(x.new_zeros(x.shape[0], 0, x.shape[2]))
        weight, bias = self.conv.weight[:, 0], self.conv.bias
        y, state = causal_convolution(
            x,
            weight,
            bias,
            state=state,
            return_state=True,
            reset=reset,
            silu=silu,
            backend=self.backend,
        )
        return y, state

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """PyTorch's default for this convolution: U(-1/sqrt(K), 1/sqrt(K)) for weight and bias."""
        if self.conv is not None:
            bound = 1 / math.sqrt(self.kernel_size)
            uniform_(self.conv.weight, bound, generator)
            if self.conv.bias is not None:
                uniform_(self.conv.bias, bound, generator)
