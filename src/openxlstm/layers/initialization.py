"""Published initial values (NeurIPS models: spec of the block stack; Large: the recipe of the 7B run).

Small init is N(0, sqrt(2 / (5 d))) (Nguyen & Salazar 2019), Wang init N(0, 2 / (L sqrt(d))) (Wang &
Komatsuzaki 2021, GPT-J), with d the width of the residual stream and L the number of blocks. Every function
draws from ``generator`` when one is given and from PyTorch's global generator otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn


def small_init_(weight: Tensor, dim: int, generator: Generator | None = None) -> None:
    """Fill ``weight`` from N(0, sqrt(2 / (5 dim)))."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)), generator=generator)


def wang_init_(weight: Tensor, dim: int, num_blocks: int, generator: Generator | None = None) -> None:
    """Fill ``weight`` from N(0, 2 / (num_blocks sqrt(dim)))."""
    nn.init.normal_(weight, std=2 / (num_blocks * math.sqrt(dim)), generator=generator)


def uniform_(weight: Tensor, bound: float, generator: Generator | None = None) -> None:
    """Fill ``weight`` from U(-bound, bound)."""
    nn.init.uniform_(weight, -bound, bound, generator=generator)


def zero_(*tensors: Tensor | None) -> None:
    """Fill every tensor that is there with zeros."""
    for tensor in tensors:
        if tensor is not None:
            nn.init.zeros_(tensor)


def linspace_(bias: Tensor, start: float, end: float) -> None:
    """Fill ``bias`` (N) with N evenly spaced values from ``start`` to ``end``."""
    with torch.no_grad():
        bias.copy_(torch.linspace(start, end, bias.shape[0]))


def powerlaw_forget_bias(head_dim: int, block_index: int, num_blocks: int) -> Tensor:
    """Forget-gate biases of one sLSTM head, (head_dim): 5 - 12 (d / (D - 1)) ^ (0.3 + 1.3 r).

    r runs from 0 in the first block to 1 in the last, so deeper blocks have more slowly forgetting cells.
    A head of one cell (where the published formula is 0 / 0) gets 5.
    """
    ratio = block_index / (num_blocks - 1) if num_blocks > 1 else 0.0
    position = torch.arange(head_dim) / max(head_dim - 1, 1)
    return 5 - 12 * position ** (0.3 + 1.3 * ratio)
