"""Backend ``portable`` of the causal convolution: PyTorch, one tap at a time, on any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, reset: Tensor | None, silu: bool
) -> Tensor:
    """The convolution of x (B, T, E) with the inputs before it (B, K - 1, E); weight (E, K)."""
    batch, time, _ = x.shape
    past = before.shape[1]
    padded = torch.cat([before, x], dim=1)  # (B, K - 1 + T, E)
    document = None  # (B, K - 1 + T): running number of the document at each position of `padded`
    if reset is not None:
        document = torch.cat([reset.new_zeros(batch, past, dtype=torch.long), reset.long().cumsum(1)], dim=1)
    taps = weight.to(x.dtype)
    y = x * taps[:, past]
    for distance in range(1, past + 1):
        start = past - distance
        tap = padded[:, start : start + time]
        if document is not None:
            same = document[:, start : start + time] == document[:, past:]
            tap = torch.where(same[..., None], tap, 0)
        y = torch.addcmul(y, tap, taps[:, start])
    if bias is not None:
        y = y + bias.to(x.dtype)
    return functional.silu(y) if silu else y
