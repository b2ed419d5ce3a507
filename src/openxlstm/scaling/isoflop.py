"""IsoFLOP profiles: at a fixed budget, loss against size is a parabola in log10, and its minimum the optimum.

L(x) = a x^2 + b x + c,   x = log10(N) or log10(D),   x* = -b / 2a              (Hoffmann et al. 2022)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openxlstm.scaling.data import Table, check_one_convention, require_runs
from openxlstm.scaling.optimization import Array
from openxlstm.scaling.power_law import PowerLaw, fit_power_law

Variable = Literal["num_params", "num_tokens"]
BUDGET_TOLERANCE = 0.1
"""Relative distance of a run's FLOPs from the budget it belongs to."""
MOST_DECADES = 99
"""Wider intervals have no end."""


@dataclass(frozen=True)
class IsoFlopFit:
    """The parabola of one budget."""

    budget: float
    """Nominal FLOPs."""
    flops: float
    """Mean FLOPs of its runs."""
    variable: Variable
    """What x is the logarithm of."""
    coefficients: tuple[float, float, float]
    """a, b, c."""
    optimum: float
    """N* or D*."""
    loss: float
    """Loss at the optimum."""
    count: int
    """Runs."""
    noise: float
    """Standard deviation of the losses around the parabola."""
    interval: tuple[float, float]
    """95 % confidence interval of the optimum (first-order error propagation); 0 to inf if unknown."""
    notes: tuple[str, ...] = ()
    """What makes the optimum doubtful."""

    def __call__(self, size: float | Array) -> Any:
        """Loss on the parabola at N or D = ``size``."""
        return np.polyval(self.coefficients, np.log10(size))


def fit_isoflop(
    sizes: Sequence[float] | Array,
    losses: Sequence[float] | Array,
    *,
    budget: float,
    flops: float | None = None,
    variable: Variable = "num_params",
) -> IsoFlopFit:
    """Fit the parabola of one budget.

    Args:
        sizes: N (or D) of the runs.
        losses: their losses.
        budget: nominal FLOPs, for reports.
        flops: mean FLOPs of the runs; None: the budget.
        variable: what ``sizes`` are.

    Raises:
        ValueError: fewer than three different sizes, losses that are not finite, or a parabola that opens
            downwards, which has no optimum.
    """
    sizes, losses = np.asarray(sizes, float), np.asarray(losses, float)
    what = f"the profile at {budget:.3g} FLOPs"
    require_runs(len(np.unique(sizes)), 3, what)
    if not np.isfinite(losses).all():
        raise ValueError(
            f"{what} has {int((~np.isfinite(losses)).sum())} losses that are not finite; drop them"
        )
    x = np.log10(sizes)
    centre = x.mean()
    design = np.stack([(x - centre) ** 2, x - centre, np.ones_like(x)], 1)
    solution, *_ = np.linalg.lstsq(design, losses, rcond=None)
    a, b, c = (float(value) for value in solution)
    if a <= 0:
        raise ValueError(
            f"{what} has no minimum: its parabola opens downwards (curvature {a:.3g}); add sizes on both "
            "sides of the optimum"
        )
    free = len(x) - 3
    noise = float(np.sqrt(((losses - design @ solution) ** 2).sum() / free)) if free > 0 else 0.0
    shift = -b / (2 * a)
    half = np.inf
    if free > 0:
        from scipy.special import stdtrit

        covariance = noise**2 * np.linalg.inv(design.T @ design)
        direction = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
        half = float(stdtrit(free, 0.975) * np.sqrt(direction @ covariance @ direction))
        half = half if half < MOST_DECADES else np.inf
    best = centre + shift
    notes: list[str] = []
    if not x.min() <= best <= x.max():
        side = "below" if best < x.min() else "above"
        factor = 10 ** max(x.min() - best, best - x.max())
        notes.append(f"the optimum lies {side} all runs, by a factor of {factor:.2f}")
    if free == 0:
        notes.append("three runs leave no scatter, so how certain the optimum is remains unknown")
    elif half > 0.15:
        notes.append(f"the optimum is uncertain by a factor of {10**half:.2g}")
    coefficients = (a, b - 2 * a * centre, a * centre**2 - b * centre + c)
    return IsoFlopFit(
        budget,
        budget if flops is None else flops,
        variable,
        coefficients,
        float(10**best),
        c - b**2 / (4 * a),
        len(x),
        noise,
        (float(10 ** (best - half)), float(10 ** (best + half))),
        tuple(notes),
    )


def isoflop_profiles(
    runs: Table, budgets: Sequence[float], variable: Variable = "num_params"
) -> list[IsoFlopFit]:
    """One fit per budget; a run belongs to a budget if its FLOPs are within 10 % of it.

    Raises:
        ValueError: see :func:`fit_isoflop`; or FLOPs counted in different ways.
    """
    check_one_convention(runs)
    fits: list[IsoFlopFit] = []
    for budget in budgets:
        group = runs[(runs["flops"] / budget - 1).abs() <= BUDGET_TOLERANCE]
        require_runs(len(group), 3, f"the profile at {budget:.3g} FLOPs")
        fits.append(
            fit_isoflop(
                group[variable].to_numpy(),
                group["val_loss"].to_numpy(),
                budget=budget,
                flops=float(group["flops"].mean()),
                variable=variable,
            )
        )
    return fits


def optimum_law(fits: Sequence[IsoFlopFit]) -> PowerLaw:
    """N*(C) or D*(C): the power law through the optima of several budgets."""
    return fit_power_law([fit.flops for fit in fits], [fit.optimum for fit in fits])
