"""Linear maps: dense, and block-diagonal where each head (or small block of channels) goes alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from openxlstm.layers.initialization import small_init_, zero_
from openxlstm.ops import linear
from openxlstm.ops.dense import computing_dtype
from openxlstm.runtime import has_fast_bfloat16


class Linear(nn.Linear):
    """``torch.nn.Linear`` on the package's dense operator, whose bfloat16 form is fast on every CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LinearHeadwise(nn.Module):
    """y[head, out] = sum_in weight[head, out, in] x[head, in] (+ bias).

    Args:
        features: width of input and output.
        num_heads: number of equal blocks the width is cut into.
        bias: add a bias, (features).

    Raises:
        ValueError: ``num_heads`` does not divide ``features``.
    """

    bias: nn.Parameter | None

    def __init__(self, features: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or features % num_heads:
            raise ValueError(
                f"{num_heads} blocks do not divide a width of {features}; choose a divisor of {features}"
            )
        self.num_heads = num_heads
        self._emulated_bfloat16 = not has_fast_bfloat16("cpu")  # then products run in float32
        head_dim = features // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(features)) if bias else None)
        self.reset_parameters(head_dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., features) -> (..., features)
        weight = _merge_blocks(self.weight)
        y = self._multiply(x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(-2)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., heads, in), (heads, out, in) -> (..., heads, out)."""
        dtype = computing_dtype(x)
        if self._emulated_bfloat16 and x.device.type == "cpu" and dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                return torch.einsum("...hi,hoi->...ho", x.float(), weight.float()).to(dtype)
        return torch.einsum("...hi,hoi->...ho", x, weight)

    def reset_parameters(self, dim: int, generator: Generator | None = None) -> None:
        """Small init for width ``dim`` (the models pass the width of their residual stream), bias 0."""
        small_init_(self.weight, dim, generator)
        zero_(self.bias)


def _merge_blocks(weight: Tensor) -> Tensor:
    """The same block-diagonal map in fewer blocks of at most 16, on which matrix products are faster."""
    heads, head_dim, _ = weight.shape
    merge = 1
    while 2 * merge * head_dim <= 16 and heads % (2 * merge) == 0:
        merge *= 2
    if merge == 1:
        return weight
    place = torch.eye(merge, dtype=weight.dtype, device=weight.device)[:, None, :, None]
    blocks = (
        weight.unflatten(0, (-1, merge))[:, :, :, None, :] * place
    )  # (heads / merge, row, out, column, in)
    return blocks.flatten(3).flatten(1, 2)
