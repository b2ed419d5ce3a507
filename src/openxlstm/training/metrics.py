"""What a run measures: loss in nats per token, bits per byte, tokens per second, model-FLOP utilisation.

bits per byte = nats per token / (ln 2 * bytes per token)      comparable between tokenizers and with gzip
utilisation   = training FLOPs per token * tokens per second / measured peak FLOPs per second
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.models import accounting
from openxlstm.ops.cross_entropy import IGNORED
from openxlstm.ops.matmul import matmul
from openxlstm.runtime import has_fast_bfloat16, measure_peak_flops


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over the targets that count, a scalar.

    A sum, because means of parts cannot be averaged exactly when the parts count different numbers of tokens.

    Args:
        logits: (B, T, V), any floating type; half precision is raised to float32.
        targets: (B, T) int64, :data:`IGNORED` where a position does not count.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss to bits per byte of text.

    Raises:
        ValueError: ``bytes_per_token`` is not positive.
    """
    if not bytes_per_token > 0:
        raise ValueError(f"bytes_per_token must be positive, got {bytes_per_token}")
    return nats_per_token / (math.log(2) * bytes_per_token)


def in_bits_per_byte(loss: float, loader: Any) -> dict[str, float]:
    """``{"bits_per_byte": ...}`` if the loader's dataset knows the size of its text, else nothing."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return {}
    return {"bits_per_byte": bits_per_byte(loss, dataset.text_bytes / len(dataset))}


class Speedometer:
    """Tokens per second and utilisation over the updates since the last reading.

    Args:
        flops_per_token: FLOPs of forward and backward per token, or None if unknown.
        peak_flops: what the device can do per second, or None if unknown.
    """

    def __init__(self, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count ``tokens`` that took ``seconds``."""
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """``tokens_per_second`` and, where it is known, ``utilisation``; starts over."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._tokens, self._seconds = 0, 0.0
        reading = {"tokens_per_second": rate}
        if self.flops_per_token and self.peak_flops:
            reading["utilisation"] = rate * self.flops_per_token / self.peak_flops
        return reading


def speedometer(
    model: nn.Module, context_length: int, autocast_dtype: torch.dtype | None, device: torch.device
) -> Speedometer:
    """A :class:`Speedometer` for ``model`` whose bound is this machine's measured matrix-product rate.

    The bound is that of the dtype the products run in: bfloat16 runs as float32 where it is not fast. A model
    that the accounting does not know, or a failing measurement, gives tokens per second only.
    """
    try:
        flops = float(accounting.training_flops_per_token(model.config, context_length))  # pyright: ignore
    except (ValueError, TypeError, AttributeError):
        return Speedometer()
    dtype = autocast_dtype or next(model.parameters()).dtype
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        dtype = torch.float32
    try:
        return Speedometer(flops, measure_peak_flops(dtype, device, product=matmul))
    except (RuntimeError, ValueError):  # a measurement is no reason to stop a run
        return Speedometer()
