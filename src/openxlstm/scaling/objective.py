"""The objective of parametric fits, in the coordinates in which it is minimised, with analytic gradients.

ln L = LSE( gamma LSE(a - alpha ln N, b - beta ln D), e ),    A = e^a, B = e^b, E = e^e
objective = sum_i huber_delta( ln L(N_i, D_i) - ln L_i )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openxlstm.scaling.optimization import Array, huber

NAMES = ("a", "b", "e", "alpha", "beta", "gamma")


def log_loss(points: Array, log_n: Any, log_d: Any) -> Array:
    """ln L, (S, n), of parameters (S, 6) at (n) points."""
    a, b, e, alpha, beta, gamma = (points[:, [column]] for column in range(6))
    inner = np.logaddexp(a - alpha * np.asarray(log_n), b - beta * np.asarray(log_d))
    return np.logaddexp(gamma * inner, e)


def derivatives(log_n: Array, log_d: Array) -> Any:
    """For :func:`minimize_batch`: a function of parameters (S, 6) that gives ln L, (S, n), at (n) points and
    its derivatives, (S, n, 6)."""

    def evaluate(points: Array) -> tuple[Array, Array]:
        a, b, e, alpha, beta, gamma = (points[:, [column]] for column in range(6))
        u, v = a - alpha * log_n, b - beta * log_d
        inner = np.logaddexp(u, v)
        outer = gamma * inner
        logs = np.logaddexp(outer, e)
        reducible = np.exp(outer - logs)
        by_size = gamma * reducible * np.exp(u - inner)
        by_tokens = gamma * reducible * np.exp(v - inner)
        slopes = np.stack(
            [by_size, by_tokens, 1 - reducible, -by_size * log_n, -by_tokens * log_d, reducible * inner], -1
        )
        return logs, slopes

    return evaluate


class Problem:
    """The objective in local coordinates: ln N, ln D shifted to their means, gamma last and only if free.

    Args:
        log_n, log_d, targets: ln N, ln D and ln L of the runs, each (n).
        delta: of the Huber loss, in ln L.
        free_gamma: whether gamma is a coordinate; otherwise it is 1.
    """

    def __init__(self, log_n: Array, log_d: Array, targets: Array, delta: float, free_gamma: bool) -> None:
        self.shift_n, self.shift_d = float(log_n.mean()), float(log_d.mean())
        self.log_n, self.log_d, self.targets = log_n - self.shift_n, log_d - self.shift_d, targets
        self.delta, self.free_gamma, self.size = delta, free_gamma, 5 + free_gamma
        self._model = derivatives(self.log_n, self.log_d)

    def _full(self, points: Array) -> Array:
        if self.free_gamma:
            return points
        return np.concatenate([points, np.ones((len(points), 1))], 1)

    def model(self, points: Array) -> tuple[Array, Array]:
        """ln L, (S, n), and its derivatives, (S, n, P), at local points (S, P)."""
        predictions, slopes = self._model(self._full(points))
        return predictions, slopes[..., : self.size]

    def value_and_gradient(self, point: Array) -> tuple[float, Array]:
        """The objective and its gradient, (P), at a local point (P)."""
        with np.errstate(over="ignore", invalid="ignore"):
            predictions, slopes = self.model(point[None])
            residuals = predictions[0] - self.targets
            value = float(huber(residuals, self.delta).sum())
            gradient = np.clip(residuals, -self.delta, self.delta) @ slopes[0]
        return (value, gradient) if np.isfinite(value) else (1e300, np.zeros(self.size))

    def polish(self, point: Array) -> tuple[float, Array]:
        """Quasi-Newton with the analytic gradient, restarted until nothing is gained."""
        from scipy.optimize import minimize

        value = self.value_and_gradient(point)[0]
        for _ in range(6):
            scale = max(value, 1e-300)  # values near 1 suit the stopping rules
            result = minimize(
                lambda p, scale=scale: tuple(u / scale for u in self.value_and_gradient(p)),
                point,
                jac=True,
                method="BFGS",
                options={"gtol": 1e-9, "maxiter": 800},
            )
            new = self.value_and_gradient(result.x)[0]
            if not new < value:
                break
            gain, value, point = 1 - new / value, new, result.x
            if gain < 1e-9:
                break
        return value, point

    def random_starts(self, count: int, seed: int) -> Array:
        """Exponents from the published grid's range; the two terms and E as plausible shares of the loss."""
        generator = np.random.default_rng(seed)
        level = self.targets.mean()
        alpha, beta = generator.uniform(0.02, 1.2, (2, count))
        gamma = (
            np.exp(generator.uniform(np.log(0.08), np.log(8.0), count)) if self.free_gamma else np.ones(count)
        )
        share = generator.uniform(0.1, 0.95, count)  # of the reducible part in the loss
        part = generator.uniform(0.05, 0.95, count)  # of the size term in the reducible part
        inner = (level + np.log(share)) / gamma
        columns = [inner + np.log(part), inner + np.log1p(-part), level + np.log1p(-share), alpha, beta]
        return np.stack(columns + ([gamma] if self.free_gamma else []), 1)

    def to_local(self, points: Sequence[Sequence[float]] | Array) -> Array:
        """Parameters (S, 6) as local points, (S, P)."""
        local = np.array(points, float).reshape(-1, 6)
        local[:, 0] -= local[:, 3] * self.shift_n
        local[:, 1] -= local[:, 4] * self.shift_d
        return local[:, : self.size]

    def to_global(self, point: Array) -> tuple[float, float, float, float, float, float]:
        """A local point (P) as parameters a, b, e, alpha, beta, gamma."""
        a, b, e, alpha, beta, *gamma = (float(u) for u in point)
        return (
            a + alpha * self.shift_n, b + beta * self.shift_d, e, alpha, beta, gamma[0] if gamma else 1.0
        )  # fmt: skip
