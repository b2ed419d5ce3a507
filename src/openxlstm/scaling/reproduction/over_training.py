"""Over-training at fixed ratios of tokens to parameters, and the best loss of a budget."""

from __future__ import annotations

import numpy as np

from openxlstm.plots import Chart, Series
from openxlstm.scaling.parametric import fit_runs
from openxlstm.scaling.power_law import fit_power_law, overtraining_slopes
from openxlstm.scaling.report import Report
from openxlstm.scaling.reproduction.checks import Check
from openxlstm.scaling.reproduction.inputs import FAMILIES, Inputs, tokenparam


def fit_slopes(report: Report, inputs: Inputs) -> list[Check]:
    """Loss against compute at each ratio of tokens to parameters."""
    report.heading("Over-training")
    rows, charts, differences = [], [], []
    for model, name in FAMILIES.items():
        table = tokenparam(inputs, model)
        series: list[Series] = []
        fits = overtraining_slopes(table)
        for color, ratio in enumerate(sorted(fits, key=float)):
            law, known = fits[ratio], _reference_slope(inputs, model, float(ratio))
            low, high = law.exponent_interval()
            interval = f"{low:.4f} to {high:.4f}" if law.count > 2 else "two runs"
            difference = None if known is None else f"{law.exponent - known:+.1e}"
            if known is not None:
                differences.append(abs(law.exponent - known))
            rows.append((name, ratio, law.exponent, interval, known, difference, law.count))
            group = table[table["preset_ratio"].astype(str) == ratio].sort_values("flops")
            x = np.geomspace(law.low, law.high, 20)
            flops, losses = group["flops"].to_numpy(), group["val_loss"].to_numpy()
            series.append(Series(flops, losses, f"{ratio} tokens per parameter", "points", color))
            series.append(Series(x, law(x), "", "dashed", color))
        charts.append(Chart(f"{name}: over-training", "FLOPs", "validation loss", series, log_y=True))
    columns = (
        "family",
        "tokens per parameter",
        "slope",
        "95 % interval",
        "reference",
        "difference (absolute)",
    )
    report.table((*columns, "runs"), rows, "ln loss against ln FLOPs at fixed ratios")
    report.figure(charts)
    if not differences:
        return []
    return [Check("slopes of over-training, absolute", len(differences), max(differences), 1e-4)]


def _reference_slope(inputs: Inputs, model: str, ratio: float) -> float | None:
    table = inputs.slopes
    if table is None:
        return None
    chosen = (table["model"] == model) & (table["token_param_ratio"] == ratio)
    return float(table[chosen]["slope"].iloc[0]) if chosen.any() else None


def pareto_front(report: Report, inputs: Inputs) -> list[Check]:
    """Loss against compute of all over-training runs, and the best loss of the fitted law."""
    report.heading("Loss against compute")
    series: list[Series] = []
    rows = []
    for color, (model, name) in enumerate(FAMILIES.items()):
        table = tokenparam(inputs, model)
        fit = fit_runs(table, delta=1.0, free_gamma=True)
        per_token = table["flops"] / (table["num_params"] * table["num_tokens"])
        law = fit_power_law(table["num_params"].to_numpy(), per_token.to_numpy())  # about 6, a little more
        budgets = np.geomspace(table["flops"].min(), table["flops"].max(), 40)
        best = [fit.optimum(c, float(law(fit.optimum(c).num_params))).loss for c in budgets]
        series.append(
            Series(table["flops"].to_numpy(), table["val_loss"].to_numpy(), f"{name} runs", "points", color)
        )
        series.append(Series(budgets, best, f"{name}: best loss of the law", "line", color))
        rows.append(
            (name, *(float(np.interp(np.log(c), np.log(budgets), best)) for c in (1e19, 1e20, 1e21, 1e22)))
        )
    report.figure([Chart("Pareto front", "FLOPs", "validation loss", series, log_y=True)], 1)
    report.table(("family", "1e19 FLOPs", "1e20", "1e21", "1e22"), rows, "Best loss of the law at a budget")
    return []
