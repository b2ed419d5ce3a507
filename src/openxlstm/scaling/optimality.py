"""How far a point of a parametric fit is from an optimum: gradient, Newton's step, conditioning.

    p = (a, b, E, alpha, beta[, gamma]);  g, H: gradient and Hessian of the objective f
    Newton's step  s = -H^-1 g,    Newton's decrement  -g s / 2,  by which the quadratic model still falls

E is used instead of its logarithm, so that E = 0 is an ordinary point. There the constraint E >= 0 may hold
the minimum: it does if df/dE > 0 (Karush, Kuhn and Tucker), and E stays out of Newton's step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openxlstm.scaling.objective import Problem
from openxlstm.scaling.optimization import Array
from openxlstm.scaling.parametric import ParametricFit

NO_E = 1e-6
"""Below so many nats E has no effect on any loss."""
STEP = 1e-5
"""Of the differences that give the Hessian, in local coordinates."""


@dataclass(frozen=True)
class Optimality:
    """What holds at a point; objective, gradient and decrement relative to the objective there."""

    gradient: float
    """Norm of the gradient in local coordinates, without E on its bound."""
    e_slope: float
    """Derivative by E, per nat."""
    decrement: float
    """By how much the quadratic model still falls; NaN where the Hessian is not positive definite."""
    condition: float
    """Condition number of the Hessian scaled to a unit diagonal; NaN likewise."""
    e_ahead: float
    """E after Newton's step; NaN likewise."""

    @property
    def bound(self) -> bool:
        """Whether a larger E makes the objective worse."""
        return self.e_slope > 0


def optimality(fit: ParametricFit) -> Optimality:
    """Examine a fit at its parameters, wherever they come from."""
    log_n, log_d, targets = (np.log(values) for values in (fit.num_params, fit.num_tokens, fit.losses))
    problem = Problem(log_n, log_d, targets, fit.delta, fit.free_gamma)
    point = problem.to_local([fit.parameters])[0]
    point[2] = np.exp(point[2])
    value, gradient = _value_and_gradient(problem, point)
    free = [index for index in range(problem.size) if index != 2 or point[2] >= NO_E]
    shifts = STEP * np.eye(problem.size)[free]
    ends = [[_value_and_gradient(problem, point + sign * s)[1] for sign in (1, -1)] for s in shifts]
    hessian = np.array([(above - below)[free] for above, below in ends]) / (2 * STEP)
    hessian, slope = (hessian + hessian.T) / 2, gradient[free]
    decrement = condition = e_ahead = float("nan")
    if np.linalg.eigvalsh(hessian)[0] > 0:
        step = -np.linalg.solve(hessian, slope)
        decrement = float(-slope @ step) / 2 / value
        scale = np.sqrt(np.diag(hessian))
        condition = float(np.linalg.cond(hessian / np.outer(scale, scale)))
        e_ahead = float(point[2] + (step[free.index(2)] if 2 in free else 0.0))
    norm = float(np.linalg.norm(slope)) / value
    return Optimality(norm, float(gradient[2]) / value, decrement, condition, e_ahead)


def _value_and_gradient(problem: Problem, point: Array) -> tuple[float, Array]:
    """The objective and its gradient by local coordinates with E in place of its logarithm."""
    with np.errstate(divide="ignore"):
        logged = np.concatenate([point[:2], np.log(point[2:3]), point[3:]])
    value, gradient = problem.value_and_gradient(logged)
    predictions, _ = problem.model(logged[None])
    pulls = np.clip(predictions[0] - problem.targets, -problem.delta, problem.delta)
    gradient[2] = pulls @ np.exp(-predictions[0])  # d ln L / dE = 1 / L
    return value, gradient
