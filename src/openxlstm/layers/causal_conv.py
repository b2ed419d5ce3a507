"""Depthwise causal convolution with a carried state and exact document boundaries.

    y_t = bias + sum_{d=0..K-1} w[K-1-d] * x_{t-d}

where x before the sequence is the carried state (zeros at the start), and a tap that would reach over a
document boundary reads zero. The state is the last K - 1 inputs, (B, K - 1, E), oldest first, with everything
before the last boundary zeroed, so that handing it on can't leak either. In the published code the states of
the full-sequence form (K - 1 rows) and of the step form (K rows) are incompatible; here there is one.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import uniform_
from openxlstm.layers.precision import at_least_float32
from openxlstm.ops.packing import check_boundaries


class CausalConv1d(nn.Module):
    """Depthwise causal convolution over time; ``kernel_size=0`` is the identity without parameters.

    Args:
        embedding_dim: number of channels E.
        kernel_size: taps K, including the current input.
        bias: add a bias per channel.

    Raises:
        ValueError: negative kernel size.
    """

    conv: nn.Conv1d | None

    def __init__(self, embedding_dim: int, kernel_size: int = 4, bias: bool = True) -> None:
        super().__init__()
        if kernel_size < 0:
            raise ValueError(
                f"conv1d_kernel_size must be 0 (no convolution) or positive, got {kernel_size}; "
                "the published value is 4"
            )
        self.embedding_dim = embedding_dim
        self.kernel_size = kernel_size
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
        self, x: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve ``x``.

        Args:
            x: (B, T, E).
            state: what came before, (B, K - 1, E); None is zeros.
            reset: bool (B, T), True where a new document starts.

        Returns:
            y (B, T, E) in the dtype of ``x``, and the new state (B, K - 1, E).

        Raises:
            ValueError: ``reset`` of another shape or dtype.
        """
        batch, time, channels = x.shape
        check_boundaries(None, reset, x)
        if self.conv is None:
            return x, at_least_float32(x.new_zeros(batch, 0, channels))
        past = self.kernel_size - 1
        before = x.new_zeros(batch, past, channels) if state is None else state.to(x.dtype)
        padded = torch.cat([before, x], dim=1)  # (B, K - 1 + T, E)

        document = None  # (B, K - 1 + T): running number of the document at each position of `padded`
        if reset is not None:
            document = torch.cat(
                [reset.new_zeros(batch, past, dtype=torch.long), reset.long().cumsum(1)], dim=1
            )

        weight = self.conv.weight.to(x.dtype)[:, 0]  # (E, K)
        y = x * weight[:, past]
        for distance in range(1, self.kernel_size):
            start = past - distance
            tap = padded[:, start : start + time]
            if document is not None:
                same = document[:, start : start + time] == document[:, past:]
                tap = torch.where(same[..., None], tap, 0)
            y = torch.addcmul(y, tap, weight[:, start])
        if self.conv.bias is not None:
            y = y + self.conv.bias.to(x.dtype)

        last = padded[:, time:]
        if document is not None:
            last = torch.where((document[:, time:] == document[:, -1:])[..., None], last, 0)
        return y, at_least_float32(last)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """PyTorch's default for this convolution: U(-1/sqrt(K), 1/sqrt(K)) for weight and bias."""
        if self.conv is not None:
            bound = 1 / math.sqrt(self.kernel_size)
            uniform_(self.conv.weight, bound, generator)
            if self.conv.bias is not None:
                uniform_(self.conv.bias, bound, generator)
