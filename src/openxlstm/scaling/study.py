"""Fitting and reporting a study of one's own: whatever its runs allow, and what they do not allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openxlstm.plots import Chart, Series
from openxlstm.scaling.data import Table, check_one_convention
from openxlstm.scaling.isoflop import IsoFlopFit, fit_isoflop, optimum_law
from openxlstm.scaling.parametric import ParametricFit, bootstrap, fit_runs
from openxlstm.scaling.power_law import PowerLaw, fit_power_law, overtraining_slopes
from openxlstm.scaling.report import Report

ASSUMPTIONS = (
    "Learning rates and batch sizes are not tuned: below 80 million parameters they follow the compute laws "
    "of DeepSeek LLM (rate 0.3118 C^-0.125, tokens per batch 0.292 C^0.327), above the settings of the "
    "published xLSTM study. Both families get the same values.",
    "One seed per run. Intervals describe the scatter around the fitted curves, not that of repeated runs.",
    "Parameters include embedding and output matrix; FLOPs count the output matrix and, in the Transformer, "
    "the causal half of attention.",
)


RUN_TABLE = (
    "model", "experiment", "isoflop", "preset_ratio", "num_params", "num_tokens", "flops", "val_loss",
    "learning_rate", "global_batch_size", "num_steps", "embedding_dim", "num_blocks",
)  # fmt: skip


@dataclass
class FamilyResult:
    """What the runs of one family give."""

    family: str
    runs: Table
    profiles: dict[str, list[IsoFlopFit]] = field(default_factory=dict)
    """Variable -> one fit per budget."""
    laws: dict[str, PowerLaw] = field(default_factory=dict)
    """Variable -> N*(C) or D*(C)."""
    loss_law: PowerLaw | None = None
    """Loss at the optimum against compute."""
    slopes: dict[str, PowerLaw] = field(default_factory=dict)
    law: ParametricFit | None = None
    notes: list[str] = field(default_factory=list)
    """What could not be fitted, or is doubtful."""


def analyse(table: Table, seed: int = 0) -> list[FamilyResult]:
    """Fit each family of a table of runs (:func:`openxlstm.scaling.data.check_runs`).

    Raises:
        ValueError: FLOPs counted in different ways.
    """
    check_one_convention(table)
    return [_analyse_family(str(family), runs, seed) for family, runs in table.groupby("model")]


def _analyse_family(family: str, runs: Table, seed: int) -> FamilyResult:
    result = FamilyResult(family, runs)
    groups = list(runs.groupby("isoflop")) if "isoflop" in runs.columns else []
    for variable in ("num_params", "num_tokens"):
        fits: list[IsoFlopFit] = []
        for budget, group in groups:
            sizes, losses = group[variable].to_numpy(), group["val_loss"].to_numpy()
            try:
                flops = float(group["flops"].mean())
                fit = fit_isoflop(sizes, losses, budget=float(budget), flops=flops, variable=variable)
            except ValueError as error:
                result.notes.append(f"{family}: {error}")
                continue
            fits.append(fit)
            result.notes += [f"{family}, {variable} at {budget:.3g} FLOPs: {note}" for note in fit.notes]
        result.profiles[variable] = fits
        if len(fits) >= 2:
            result.laws[variable] = optimum_law(fits)
    optima = result.profiles["num_params"]
    if len(optima) >= 2:
        result.loss_law = fit_power_law([fit.flops for fit in optima], [fit.loss for fit in optima])
    if "preset_ratio" in runs.columns:
        labelled = runs[runs["preset_ratio"].notna() & (runs["preset_ratio"].astype(str) != "")]
        try:
            result.slopes = overtraining_slopes(labelled) if len(labelled) else {}
        except ValueError as error:
            result.notes.append(f"{family}: {error}")
    try:
        result.law = bootstrap(fit_runs(runs, delta=1e-2, seed=seed), 200, seed=seed)
        result.notes += [f"{family}, parametric law: {note}" for note in result.law.diagnostics()]
    except ValueError as error:
        result.notes.append(f"{family}: {error}")
    return result


def study_report(
    results: Sequence[FamilyResult], title: str, facts: Sequence[str] = (), limits: Sequence[str] = ()
) -> Report:
    """The report of a study.

    Args:
        results: from :func:`analyse`.
        title: of the page.
        facts: paragraphs on data, machine and design.
        limits: what the study cannot say.
    """
    report = Report(title)
    for fact in facts:
        report.text(fact)
    report.heading("Assumptions and limits")
    report.notes([*limits, *ASSUMPTIONS])
    if any(result.profiles["num_params"] for result in results):
        report.heading("IsoFLOP profiles")
        report.figure(
            [_profile_chart(result, variable) for result in results for variable in result.profiles]
        )
        report.table(
            ("family", "budget", "N*", "95 % interval", "D*", "D*/N*", "loss at N*", "runs", "noise"),
            [row for result in results for row in _optimum_rows(result)],
            "Minima of the parabolas, and the scatter of the runs around them",
        )
    if any(result.laws for result in results):
        report.heading("Optimal size and tokens against compute")
        report.table(
            ("family", "quantity", "exponent", "95 % interval", "coefficient", "budgets"),
            [row for result in results for row in _law_rows(result)],
            "Power laws through the optima",
        )
    report.figure(_law_charts(results))
    if any(result.slopes for result in results):
        report.heading("Over-training")
        rows = [
            (result.family, ratio, law.exponent, _interval(*law.exponent_interval()), law.count)
            for result in results
            for ratio, law in result.slopes.items()
        ]
        report.table(("family", "tokens per parameter", "slope", "95 % interval", "runs"), rows)
    report.heading("Parametric law L(N, D) = E + A N^-alpha + B D^-beta")
    rows = []
    for result in results:
        if result.law is not None:
            c, low_high = result.law.constants, result.law.parameter_intervals()
            rows.append(
                (result.family, c["E"], c["A"], c["B"], c["alpha"], _interval(*low_high["alpha"]), c["beta"],
                 _interval(*low_high["beta"]), result.law.r_squared, len(result.runs))
            )  # fmt: skip
    columns = ("family", "E", "A", "B", "alpha", "95 %", "beta", "95 %", "R²", "runs")
    report.table(columns, rows)
    notes = [note for result in results for note in result.notes]
    if notes:
        report.heading("Doubts")
        report.notes(notes)
    report.heading("Runs")
    columns = [name for name in RUN_TABLE if all(name in result.runs.columns for result in results)]
    rows = [
        [None if isinstance(row[n], float) and np.isnan(row[n]) else _plain(row[n]) for n in columns]
        for result in results
        for _, row in result.runs.iterrows()
    ]
    report.table(columns, rows)
    return report


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if np.isfinite([low, high]).all() else "unknown"


def _optimum_rows(result: FamilyResult) -> list[tuple[Any, ...]]:
    tokens = {fit.budget: fit.optimum for fit in result.profiles["num_tokens"]}
    return [
        (result.family, f"{fit.budget:.2g}", fit.optimum, _interval(*fit.interval), tokens.get(fit.budget),
         tokens[fit.budget] / fit.optimum if fit.budget in tokens else None, fit.loss, fit.count, fit.noise)
        for fit in result.profiles["num_params"]
    ]  # fmt: skip


def _law_rows(result: FamilyResult) -> list[tuple[Any, ...]]:
    names = {"num_params": "N*(C)", "num_tokens": "D*(C)"}
    laws = [(names[variable], law) for variable, law in result.laws.items()]
    if result.loss_law is not None:
        laws.append(("loss at the optimum", result.loss_law))
    return [
        (result.family, name, law.exponent, _interval(*law.exponent_interval()), law.coefficient, law.count)
        for name, law in laws
    ]


def _profile_chart(result: FamilyResult, variable: str) -> Chart:
    series: list[Series] = []
    for color, fit in enumerate(result.profiles[variable]):
        group = result.runs[result.runs["isoflop"] == fit.budget]
        x = group[variable].to_numpy()
        curve = np.geomspace(min(x.min(), fit.optimum), max(x.max(), fit.optimum), 60)
        series += [
            Series(x, group["val_loss"].to_numpy(), f"{fit.budget:.2g} FLOPs", "points", color),
            Series(curve, fit(curve), "", "dashed", color),
            Series([fit.optimum], [fit.loss], "", "star", color),
        ]
    label = "parameters" if variable == "num_params" else "tokens"
    return Chart(f"{result.family}: loss against {label}", label, "validation loss (nats per token)", series)


def _law_charts(results: Sequence[FamilyResult]) -> list[Chart]:
    charts: list[Chart] = []
    for variable, label in (("num_params", "optimal parameters"), ("num_tokens", "optimal tokens")):
        series: list[Series] = []
        for color, result in enumerate(results):
            if variable in result.laws:
                law, fits = result.laws[variable], result.profiles[variable]
                x = np.geomspace(law.low / 1.5, law.high * 1.5, 40)
                series.append(
                    Series([f.flops for f in fits], [f.optimum for f in fits], result.family, "points", color)
                )
                series.append(Series(x, law(x), f"exponent {law.exponent:.3f}", "dashed", color))
        if series:
            charts.append(Chart(label, "FLOPs", label, series, log_y=True))
    series = []
    for color, result in enumerate(results):
        runs = result.runs
        series.append(
            Series(runs["flops"].to_numpy(), runs["val_loss"].to_numpy(), result.family, "points", color)
        )
        if result.loss_law is not None:
            x = np.geomspace(result.loss_law.low, result.loss_law.high, 40)
            series.append(Series(x, result.loss_law(x), "", "line", color))
    charts.append(Chart("Pareto front", "FLOPs", "validation loss", series, log_y=True))
    return charts
