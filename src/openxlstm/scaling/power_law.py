"""Power laws y = A x^k by least squares in logarithms, with confidence intervals; over-training slopes.

    ln y = ln A + k ln x + noise            ordinary least squares, Student's t with n - 2 degrees of freedom

Used for the compute-optimal sizes N*(C) and D*(C), and for loss against compute at a fixed ratio of tokens to
parameters (Gadre et al. 2024: these lines stay parallel when a model is over-trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openxlstm.scaling.data import Table, require_runs
from openxlstm.scaling.optimization import Array


@dataclass(frozen=True)
class PowerLaw:
    """A fitted power law."""

    coefficient: float
    """A."""
    exponent: float
    """k."""
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Of (ln A, k); infinite for an exact fit through two points."""
    noise: float
    """Standard deviation of ln y around the line."""
    count: int
    """Points that it was fitted to."""
    low: float
    """Least x among them."""
    high: float
    """Largest x among them."""

    def __call__(self, x: float | Array) -> Any:
        """Predicted y."""
        return self.coefficient * np.asarray(x, float) ** self.exponent

    def inverse(self, y: float | Array) -> Any:
        """The x at which y is predicted."""
        return (np.asarray(y, float) / self.coefficient) ** (1 / self.exponent)

    def exponent_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the exponent."""
        half = self._quantile(level) * self.covariance[1][1] ** 0.5
        return float(self.exponent - half), float(self.exponent + half)

    def interval(self, x: float, level: float = 0.95, *, prediction: bool = False) -> tuple[float, float]:
        """Confidence interval of the line at ``x``; ``prediction`` adds the noise of a single point."""
        direction = np.array([1.0, np.log(x)])
        variance = float(direction @ np.array(self.covariance) @ direction)
        half = self._quantile(level) * (variance + prediction * self.noise**2) ** 0.5
        centre = np.log(float(self(x)))
        return float(np.exp(centre - half)), float(np.exp(centre + half))

    def extrapolation(self, x: float) -> float:
        """By which factor ``x`` lies outside the fitted range, 1 inside."""
        return max(self.low / x, x / self.high, 1.0)

    def _quantile(self, level: float) -> float:
        from scipy.special import stdtrit

        if self.count < 3:
            return np.inf
        return float(stdtrit(self.count - 2, 0.5 + level / 2))


def fit_power_law(x: Sequence[float] | Array, y: Sequence[float] | Array) -> PowerLaw:
    """Fit y = A x^k.

    Raises:
        ValueError: fewer than two points, values that are not positive and finite, or a single x.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x and y must be two lists of equal length, got shapes {x.shape} and {y.shape}")
    require_runs(len(x), 2, "a power law")
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError("a power law needs positive, finite values; drop the others first")
    if np.ptp(x) == 0:
        raise ValueError(f"a power law needs different x, all are {x[0]:.4g}")
    u, v = np.log(x), np.log(y)
    centre = u.mean()
    spread = float(((u - centre) ** 2).sum())
    exponent = float(((u - centre) * v).sum() / spread)
    intercept = float(v.mean() - exponent * centre)
    residuals = v - intercept - exponent * u
    free = len(x) - 2
    variance = float((residuals**2).sum() / free) if free else np.inf
    covariance = variance * np.array(
        [[1 / len(x) + centre**2 / spread, -centre / spread], [-centre / spread, 1 / spread]]
    )
    pairs = (covariance[0, 0], covariance[0, 1]), (covariance[1, 0], covariance[1, 1])
    noise = variance**0.5 if free else 0.0
    return PowerLaw(float(np.exp(intercept)), exponent, pairs, noise, len(x), float(x.min()), float(x.max()))


def overtraining_slopes(runs: Table, labels: str = "preset_ratio") -> dict[str, PowerLaw]:
    """Loss against compute for each label of the ratio D / N that has at least two runs ("extra" is none).

    Raises:
        ValueError: no such column, or no label with two runs.
    """
    if labels not in runs.columns:
        raise ValueError(
            f"the runs have no column {labels}, which says the intended ratio of tokens to parameters"
        )
    fits: dict[str, PowerLaw] = {}
    for label, group in runs.groupby(labels):
        if str(label) not in ("", "extra") and len(group) > 1 and np.ptp(group["flops"]) > 0:
            fits[str(label)] = fit_power_law(group["flops"].to_numpy(), group["val_loss"].to_numpy())
    if not fits:
        raise ValueError(
            f"no value of {labels} has two runs of different compute, so there is no slope to fit"
        )
    return fits
