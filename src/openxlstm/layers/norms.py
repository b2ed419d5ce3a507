"""Normalisation layers of both model families.

Block stack: mean/variance LayerNorm with scale ``1 + weight`` (weights start at 0), eps 1e-5.
Large: RMSNorm and per-head LayerNorm with plain weights (start at 1), eps 1e-6, computed in float32 and cast
back to the input's dtype *before* the weight is applied.

A multi-head norm normalises every head on its own and then scales all channels: (B, T, H, D) -> (B, T, H D).
The output gate and the skip path that follow belong to the same operator, :func:`openxlstm.ops.head_norm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.ops import head_norm


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * (1 + weight), over the last dimension."""

    def __init__(self, embedding_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(embedding_dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., E) -> (..., E)
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, eps=self.eps)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class MultiHeadLayerNorm(nn.Module):
    """Per-head LayerNorm, then scale ``1 + weight`` per channel; ``affine=False`` leaves the scale out."""

    weight: nn.Parameter | None

    def __init__(self, embedding_dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.zeros(embedding_dim)) if affine else None)

    def forward(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        skip: Tensor | None = None,
        skip_weight: Tensor | None = None,
    ) -> Tensor:
        """(B, T, H, D) -> (B, T, H D): (norm(x) + skip_weight * skip) * SiLU(gate), as far as given."""
        return head_norm(
            x, self.weight, weight_offset=1.0, eps=self.eps, gate=gate, activation="silu", skip=skip,
            skip_weight=skip_weight, widen=False,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)


class _PlainNorm(nn.Module):
    """Weight, optional bias and precision of the Large norms."""

    bias: nn.Parameter | None

    def __init__(
        self, embedding_dim: int, eps: float = 1e-6, bias: bool = False, force_float32: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.force_float32 = force_float32
        self.weight = nn.Parameter(torch.ones(embedding_dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(embedding_dim)) if bias else None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RMSNorm(_PlainNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight (+ bias), over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:  # (..., E) -> (..., E)
        return head_norm(
            x.unsqueeze(-2), self.weight, self.bias, center=False, eps=self.eps, widen=self.force_float32
        )


class PlainMultiHeadLayerNorm(_PlainNorm):
    """Per-head LayerNorm, then ``weight`` (and bias) per channel: the head norm of xLSTMLarge."""

    def forward(self, x: Tensor, *, gate: Tensor | None = None) -> Tensor:
        """(B, T, H, D) -> (B, T, H D), times sigmoid(gate) if there is one."""
        return head_norm(x, self.weight, self.bias, eps=self.eps, gate=gate, widen=self.force_float32)
