"""Models of the published inference times."""

from __future__ import annotations

from typing import Any

import numpy as np

from openxlstm.plots import Chart, Series
from openxlstm.scaling.inference_time import TimeModel, fit_measurements, measured_cost
from openxlstm.scaling.report import Report, relative
from openxlstm.scaling.reproduction.checks import Check
from openxlstm.scaling.reproduction.inputs import Inputs

FAMILIES = {"xlstm": "xLSTM", "llama2": "Transformer"}
MEDIAN_ERRORS = {"xlstm": 0.05, "llama2": 0.12}
"""Limits of the median relative error of the time to first token."""


def fit_times(report: Report, inputs: Inputs) -> list[Check]:
    """Time to first token and time of one step, per family and size."""
    if inputs.measurements is None:
        return []
    report.heading("Inference times on one H100")
    names = {"ttft": "time to first token", "steptime": "time of one step"}
    columns = ("family", "size", "rate (per s)", "reference", "difference", "latency (ms)", "per row (ms)")
    checks: list[Check] = []
    for quantity, title in names.items():
        models = fit_measurements(inputs.measurements, quantity)
        ordered = sorted(models.items(), key=_by_size)
        rows = [_time_row(inputs, quantity, key, model) for key, model in ordered]
        report.table((*columns, "median relative error", "measurements"), rows, title)
        charts = [_time_chart(inputs, quantity, title, family, models) for family in FAMILIES]
        report.figure(charts)
        if quantity == "ttft":
            for family, limit in MEDIAN_ERRORS.items():
                errors = [model.median_error for key, model in models.items() if key[0] == family]
                what = f"{title}, {FAMILIES[family]}: median error of a size"
                checks.append(Check(what, len(errors), max(errors, default=np.nan), limit))
    return checks


def _by_size(item: tuple[tuple[str, str], TimeModel]) -> tuple[str, float]:
    return item[0][0], size_number(item[0][1])


def size_number(size: str) -> float:
    """ "160m" -> 1.6e8."""
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


def _time_row(inputs: Inputs, quantity: str, key: tuple[str, str], model: TimeModel) -> tuple[Any, ...]:
    known = None
    if inputs.times is not None:
        kind, column = ("ttft", "alpha_flops") if quantity == "ttft" else ("step_time", "beta_bytes")
        table = inputs.times
        rows = table[(table["model"] == key[0]) & (table["size"] == key[1]) & (table["quantity"] == kind)]
        known = float(rows[column].iloc[0]) if len(rows) else None
    return (
        FAMILIES[key[0]], key[1], model.rate, known,
        "" if known is None else relative(model.rate, known), model.latency * 1e3, model.row_latency * 1e3,
        model.median_error, len(model.relative_errors),
    )  # fmt: skip


def _time_chart(inputs: Inputs, quantity: str, title: str, family: str, models: Any) -> Chart:
    """Measured and fitted times over the prompt's length: batch 1 for prompts, 8 for steps."""
    table, batch = inputs.measurements, 1 if quantity == "ttft" else 8
    assert table is not None
    series: list[Series] = []
    sizes = sorted((size for kind, size in models if kind == family), key=size_number)
    for color, size in enumerate(sizes):
        rows = table[
            (table["model.model_tag"] == f"{family}_{size}")
            & (table["input_params.batchsize"] == batch)
            & (table["input_params.prefill"] > 0)
            & (table[f"measured_data.{quantity}"] > 0)
        ].sort_values("input_params.prefill")
        if not len(rows):
            continue
        x = rows["input_params.prefill"].to_numpy()
        costs = [measured_cost(row, quantity) for _, row in rows.iterrows()]
        work = [cost.flops if quantity == "ttft" else cost.bytes for cost in costs]
        fitted = models[family, size](work, batch) * 1e3
        series.append(Series(x, rows[f"measured_data.{quantity}"].to_numpy(), size, "points", color))
        series.append(Series(x, fitted, "", "dashed", color))
    return Chart(
        f"{FAMILIES[family]}: {title}, batch {batch}", "tokens before", "milliseconds", series, log_y=True
    )
