"""One published parametric fit beside the same fit made here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from openxlstm.scaling.data import Table
from openxlstm.scaling.objective import NAMES
from openxlstm.scaling.optimality import NO_E, Optimality, optimality
from openxlstm.scaling.optimization import huber
from openxlstm.scaling.parametric import ParametricFit, fit_parametric
from openxlstm.scaling.reproduction.inputs import CELL, FAMILIES

EXPERIMENTS = {"all": ("tokenparam", "isoflop"), "isoflop": ("isoflop",), "tokenparam": ("tokenparam",)}
SETTING = ("family", "runs", "tokens/N", "δ", "γ")
"""Names of :attr:`Cell.setting`."""
PARAMETER_LIMIT = 0.01
"""Relative difference of a parameter from the published one."""
AT_BOUND = "the minimum lies at E = 0"
UNCONVERGED = "the published point has not converged"
DIFFERENT = "another optimum"


@dataclass(frozen=True)
class Cell:
    """A published fit, and ours of the same runs."""

    row: Any
    """Of ``ref_parametric_fits.csv``."""
    fit: ParametricFit

    @cached_property
    def published(self) -> ParametricFit:
        """The published parameters on the same runs, with their objective computed here."""
        known = parameters_of(self.row)
        data = self.fit.num_params, self.fit.num_tokens, self.fit.losses
        fit = ParametricFit(known, 0.0, self.fit.delta, self.fit.free_gamma, *data)
        objective = float(huber(fit.residuals, fit.delta).sum())
        return ParametricFit(known, objective, self.fit.delta, self.fit.free_gamma, *data)

    @cached_property
    def continued(self) -> ParametricFit:
        """Where our optimiser ends that starts from the published parameters and nowhere else."""
        fit = self.published
        options = {"delta": fit.delta, "free_gamma": fit.free_gamma, "starts": 0, "polish": 1}
        data = fit.num_params, fit.num_tokens, fit.losses
        return fit_parametric(*data, **options, extra_starts=[fit.parameters])

    @property
    def setting(self) -> tuple[str, str, str, str, str]:
        """What was fitted: family, experiments, tokens per parameter, delta, gamma."""
        family, kind, ratios = (self.row[name] for name in ("model", "experiment_set", "token_param_range"))
        return FAMILIES[family], kind, ratios, f"{self.fit.delta:g}", "free" if self.fit.free_gamma else "1"

    @property
    def name(self) -> str:
        """What was fitted, in words."""
        family, kind, ratios, delta, gamma = self.setting
        return f"{family}, {kind} {ratios}, delta {delta}, gamma {gamma}"

    @property
    def objective_difference(self) -> float:
        """Objective relative to the published one; negative is better."""
        return self.fit.objective / float(self.row["objective"]) - 1

    @property
    def prediction_difference(self) -> float:
        """Largest difference of a predicted loss at the runs, in nats."""
        points = self.fit.num_params, self.fit.num_tokens
        return float(np.abs(self.fit(*points) - self.published(*points)).max())

    @cached_property
    def at_published(self) -> Optimality:
        """How far the published point is from an optimum."""
        return optimality(self.published)

    @cached_property
    def at_ours(self) -> Optimality:
        """How far our point is from an optimum."""
        return optimality(self.fit)

    @cached_property
    def reason(self) -> str:
        """Why, without outer exponent, a parameter is not within 1 % of the published; "" if all are.

        :data:`AT_BOUND`: both E are practically zero, and at both points the objective grows with E.
        :data:`UNCONVERGED`: continued with gradients, the published point falls to a lower objective and ends
        at our parameters. :data:`DIFFERENT`: neither.
        """
        ours, theirs = self.fit, self.published
        if ours.free_gamma:
            return ""
        if max(ours.constants["E"], theirs.constants["E"]) < NO_E:
            return AT_BOUND if self.at_ours.bound and self.at_published.bound else DIFFERENT
        if parameter_difference(ours, theirs) <= PARAMETER_LIMIT:
            return ""
        lower = max(ours.objective, self.continued.objective) < theirs.objective
        same = parameter_difference(ours, self.continued) <= PARAMETER_LIMIT
        return UNCONVERGED if lower and same else DIFFERENT

    @property
    def examined(self) -> bool:
        """Whether the published point needs a closer look: for :attr:`reason`, or an objective above ours by
        more than 1e-5 of it."""
        return bool(self.reason) or self.fit.objective < self.published.objective * (1 - 1e-5)


def exponent_difference(fit: ParametricFit, other: ParametricFit) -> float:
    """Largest relative difference of a, b, alpha and beta."""
    names = ("a", "b", "alpha", "beta")
    return max(abs(getattr(fit, name) / getattr(other, name) - 1) for name in names)


def e_difference(fit: ParametricFit, other: ParametricFit) -> float:
    """Relative difference of E; where the other's E is practically zero, the absolute one in nats."""
    ours, theirs = fit.constants["E"], other.constants["E"]
    return abs(ours - theirs) / (theirs if theirs >= NO_E else 1.0)


def parameter_difference(fit: ParametricFit, other: ParametricFit) -> float:
    """The larger of :func:`exponent_difference` and :func:`e_difference`."""
    return max(exponent_difference(fit, other), e_difference(fit, other))


def parameters_of(row: Any) -> tuple[float, float, float, float, float, float]:
    """The published a, b, e, alpha, beta, gamma."""
    a, b, e, alpha, beta, gamma = (float(row[name]) for name in NAMES)
    return a, b, e, alpha, beta, gamma


def cell_runs(runs: Table, row: Any) -> Table:
    """The runs of one published fit: family, experiments, range of tokens per parameter, context 8192."""
    low, high = (float(bound) for bound in row["token_param_range"].split("-"))
    table = runs[(runs["model"] == row["model"]) & (runs["context_length"] == 8192)]
    table = table[table["experiment"].isin(EXPERIMENTS[row["experiment_set"]])]
    ratio = table["num_tokens"] / table["num_params"]
    return table[(ratio >= low) & (ratio <= high)]


def fit_cell(runs: Table, row: Any, extra: Any = ()) -> Cell:
    """Fit the runs of a published fit, from random starts (the published point is not among them).

    Args:
        runs: all complete runs.
        row: of ``ref_parametric_fits.csv``.
        extra: further starts, such as our fit at a neighbouring delta.
    """
    table = cell_runs(runs, row)
    sizes, tokens, losses = (table[name].to_numpy() for name in ("num_params", "num_tokens", "val_loss"))
    options = {"delta": float(row["huber_delta"]), "free_gamma": bool(row["fit_gamma"])}
    fit = fit_parametric(sizes, tokens, losses, **options, starts=320, polish=8, extra_starts=extra)
    return Cell(row, fit)


def fit_cells(runs: Table, reference: Table) -> list[Cell]:
    """All published fits whose runs are all in the table; neighbouring deltas start from each other."""
    complete = reference[reference["raw_data_available"]] if "raw_data_available" in reference else reference
    cells: list[Cell] = []
    for _, group in complete.groupby(list(CELL[:-1])):
        extra: list[Any] = []
        for _, row in group.sort_values("huber_delta", ascending=False).iterrows():
            cells.append(fit_cell(runs, row, extra))
            extra = [cells[-1].fit.parameters]
    return cells
