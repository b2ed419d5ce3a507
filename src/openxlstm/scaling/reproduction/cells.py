"""One published parametric fit beside the same fit made here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from openxlstm.scaling.data import Table
from openxlstm.scaling.optimization import huber
from openxlstm.scaling.parametric import NAMES, ParametricFit, fit_parametric
from openxlstm.scaling.reproduction.inputs import CELL, FAMILIES

EXPERIMENTS = {"all": ("tokenparam", "isoflop"), "isoflop": ("isoflop",), "tokenparam": ("tokenparam",)}
NO_E = 1e-6
"""Below so many nats the logarithm of E is free: it has no effect on any loss."""


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
    def name(self) -> str:
        """What was fitted, in words."""
        gamma = "free" if self.fit.free_gamma else "1"
        family, kind, ratios = (self.row[name] for name in ("model", "experiment_set", "token_param_range"))
        return f"{FAMILIES[family]}, {kind} {ratios}, delta {self.fit.delta:g}, gamma {gamma}"

    @property
    def objective_difference(self) -> float:
        """Objective relative to the published one; negative is better."""
        return self.fit.objective / float(self.row["objective"]) - 1

    @property
    def prediction_difference(self) -> float:
        """Largest difference of a predicted loss at the runs, in nats."""
        points = self.fit.num_params, self.fit.num_tokens
        return float(np.abs(self.fit(*points) - self.published(*points)).max())

    @property
    def moved(self) -> bool:
        """Whether the published point is no optimum.

        That is, our objective is lower by more than 1e-5 of it or, without outer exponent, a parameter
        differs by more than 1 %.
        """
        far = (
            max(exponent_difference(self.fit, self.published), e_difference(self.fit, self.published)) > 0.01
        )
        lower = self.fit.objective < self.published.objective * (1 - 1e-5)
        return lower or (far and not self.fit.free_gamma)


def exponent_difference(fit: ParametricFit, other: ParametricFit) -> float:
    """Largest relative difference of a, b, alpha and beta."""
    names = ("a", "b", "alpha", "beta")
    return max(abs(getattr(fit, name) / getattr(other, name) - 1) for name in names)


def e_difference(fit: ParametricFit, other: ParametricFit) -> float:
    """Relative difference of E; where the other's E is practically zero, the absolute one in nats."""
    ours, theirs = fit.constants["E"], other.constants["E"]
    return abs(ours - theirs) / (theirs if theirs >= NO_E else 1.0)


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
