"""Many small non-linear fits at once: a batched Levenberg-Marquardt for Huber losses.

Every member of the batch has its own parameters and its own weights of the data (for bootstrap samples), and
all advance together in a few NumPy calls per iteration. The Huber loss is handled by reweighting: the weight
of a residual beyond delta is delta / |r|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Model = Callable[[Array], tuple[Array, Array]]
"""Parameters (S, P) -> predictions (S, n) and their derivatives (S, n, P)."""


def huber(residuals: Array, delta: float) -> Array:
    """r^2 / 2 up to ``delta``, then delta (|r| - delta / 2)."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))


def minimize_batch(
    model: Model,
    targets: Array,
    starts: Array,
    delta: float,
    *,
    weights: Array | None = None,
    iterations: int = 60,
    tolerance: float = 1e-12,
) -> tuple[Array, Array]:
    """Minimise sum_i w_i huber(model(p)_i - y_i) from every start.

    Args:
        model: predictions and derivatives of a whole batch.
        targets: y (n).
        starts: (S, P).
        delta: of the Huber loss.
        weights: (S, n) or (n); None is 1.
        iterations: at most so many.
        tolerance: relative decrease below which a member has converged.

    Returns:
        parameters (S, P) and objectives (S).
    """
    points = np.array(starts, float)
    count, size = points.shape
    weights = np.broadcast_to(1.0 if weights is None else np.asarray(weights, float), (count, len(targets)))
    damping = np.full(count, 1e-2)
    quiet = np.zeros(count, int)  # iterations in a row without a real decrease
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        predictions, slopes = model(points)
        residuals, slopes = predictions - targets, np.array(slopes)
        objective = (weights * huber(residuals, delta)).sum(1)
        objective = np.where(np.isfinite(objective), objective, np.inf)
        for _ in range(iterations):
            (active,) = np.nonzero((quiet < 3) & np.isfinite(objective))
            if not len(active):
                break
            r, j = residuals[active], slopes[active]
            w = weights[active] * np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
            normal = np.matmul((j * w[..., None]).swapaxes(1, 2), j)
            gradient = np.matmul(j.swapaxes(1, 2), (w * r)[..., None])
            scale = np.einsum("spp->sp", normal)
            floor = 1e-12 * scale.max(1, keepdims=True) + 1e-300
            normal += np.eye(size) * (damping[active, None] * np.maximum(scale, floor))[:, None]
            step = np.linalg.solve(normal, gradient)[..., 0]
            trial = points[active] - step
            new_predictions, new_slopes = model(trial)
            new_residuals = new_predictions - targets
            value = (weights[active] * huber(new_residuals, delta)).sum(1)
            better = np.isfinite(value) & (value < objective[active])
            small = ~better | (objective[active] - value < tolerance * objective[active])
            quiet[active] = np.where(small, quiet[active] + 1, 0)
            quiet[active[~better & (damping[active] < 1e8)]] = 0  # try again with more damping
            damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 5), 1e-12, 1e10)
            moved = active[better]
            points[moved], objective[moved] = trial[better], value[better]
            residuals[moved], slopes[moved] = new_residuals[better], new_slopes[better]
    return points, objective
