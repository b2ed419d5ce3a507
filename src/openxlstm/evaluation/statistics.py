"""Means with confidence intervals, from few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, 1.96 is near enough."""


class Estimate(NamedTuple):
    """A mean over runs and half the width of its 95 % confidence interval, None for a single run."""

    mean: float
    half_width: float | None
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of ``values`` and its 95 % interval by Student's t: s t / sqrt(n), s the sample deviation.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if not count:
        raise ValueError("an estimate needs at least one value")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = QUANTILES[count - 2] if count - 2 < len(QUANTILES) else 1.96
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)
