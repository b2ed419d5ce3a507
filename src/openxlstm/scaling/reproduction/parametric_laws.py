"""The published parametric fits, each fitted again, and the prediction of the longest run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openxlstm.scaling.optimality import NO_E
from openxlstm.scaling.parametric import bootstrap, fit_runs
from openxlstm.scaling.report import Report, relative
from openxlstm.scaling.reproduction.cells import (
    AT_BOUND,
    DIFFERENT,
    PARAMETER_LIMIT,
    SETTING,
    UNCONVERGED,
    Cell,
    e_difference,
    exponent_difference,
    fit_cells,
    parameters_of,
)
from openxlstm.scaling.reproduction.checks import Check
from openxlstm.scaling.reproduction.inputs import FAMILIES, Inputs, tokenparam
from openxlstm.scaling.reproduction.published_points import examine_published_points


def fit_laws(report: Report, inputs: Inputs) -> list[Check]:
    """Every published fit again; without the published ones, both families with and without gamma."""
    report.heading("Parametric laws L(N, D) = E + (A N^-α + B D^-β)^γ")
    if inputs.parametric is None:
        _fits_of_our_own(report, inputs)
        return []
    cells = fit_cells(inputs.runs, inputs.parametric)
    if not cells:
        report.text("None of the published fits has all its runs in the table.")
        return []
    worst = max(cell.objective_difference for cell in cells)
    report.text(
        f"{len(cells)} of {len(inputs.parametric)} published fits have all their runs in the table. Objective"
        f" relative to the published optimum: at most {worst:+.1e}; below zero means better than published."
    )
    columns = (*SETTING, "objective", "difference", "α", "ref.", "β", "ref.", "E", "ref.", "γ", "ref.")
    rows = [_row(cell) for cell in cells]
    report.table((*columns, "largest difference of a predicted loss", "R²"), rows)
    examine_published_points(report, [cell for cell in cells if cell.examined])
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.fit.diagnostics():
            remarks.setdefault(note, []).append(cell.name)
    if remarks:
        report.text("What the data leave open:")
        report.notes([f"{note} ({'; '.join(names)})" for note, names in remarks.items()])
    return _checks(cells)


def _checks(cells: Sequence[Cell]) -> list[Check]:
    plain = [cell for cell in cells if not cell.fit.free_gamma]
    objectives = [cell.objective_difference for cell in cells]
    checks = [
        Check(
            "objectives of parametric fits above the published, relative", len(cells), max(objectives), 1e-4
        )
    ]
    if plain:
        differences = [exponent_difference(cell.fit, cell.published) for cell in plain]
        what = "without outer exponent: a, b, alpha, beta, relative"
        checks.append(Check(what, len(plain), max(differences), PARAMETER_LIMIT))
    for what, reasons, fit_of, limit in (
        ("E where identified, relative", ("", DIFFERENT), "published", PARAMETER_LIMIT),
        ("E where the minimum is E = 0, in nats", (AT_BOUND,), "published", NO_E),
        (
            "E, unconverged point continued",
            (UNCONVERGED,),
            "continued",
            PARAMETER_LIMIT,
        ),
    ):
        differences = [e_difference(c.fit, getattr(c, fit_of)) for c in plain if c.reason in reasons]
        if differences:
            checks.append(Check(f"without outer exponent: {what}", len(differences), max(differences), limit))
    largest = max(cell.prediction_difference for cell in cells)
    checks.append(Check("predicted losses at the runs, absolute", len(cells), largest, 1e-3))
    return checks


def _fits_of_our_own(report: Report, inputs: Inputs) -> None:
    rows = []
    for model, name in FAMILIES.items():
        for free in (False, True):
            fit = fit_runs(tokenparam(inputs, model), free_gamma=free)
            gamma = "free" if free else "1"
            rows.append((name, gamma, fit.objective, *fit.constants.values(), fit.r_squared))
    report.table(("family", "gamma", "objective", "E", "A", "B", "α", "β", "γ", "R²"), rows)


def _row(cell: Cell) -> tuple[Any, ...]:
    fit, (_, _, _, alpha, beta, gamma) = cell.fit, parameters_of(cell.row)
    return (
        *cell.setting, fit.objective, relative(fit.objective, cell.row["objective"]), fit.alpha, alpha,
        fit.beta, beta, fit.constants["E"], cell.published.constants["E"], fit.gamma, gamma,
        f"{cell.prediction_difference:.1e}", fit.r_squared,
    )  # fmt: skip


def predict_longest_run(report: Report, inputs: Inputs) -> list[Check]:
    """The longest xLSTM run, predicted from the others."""
    table = tokenparam(inputs, "mlstm")
    long = table["num_tokens"].idxmax()
    size, tokens, loss = (float(table.loc[long, n]) for n in ("num_params", "num_tokens", "val_loss"))
    report.heading("A prediction")
    rows, errors = [], {}
    for free in (True, False):
        fit = bootstrap(fit_runs(table.drop(long), free_gamma=free), 400)
        low, high = fit.interval(size, tokens)
        predicted = float(fit(size, tokens))
        errors[free] = abs(predicted - loss)
        covered = "yes" if low < loss < high else "no"
        interval = f"{low:.4f} to {high:.4f}"
        rows.append(("free" if free else "1", predicted, loss, f"{predicted - loss:+.4f}", interval, covered))
    columns = ("gamma", "predicted loss", "measured", "error", "95 % prediction interval", "covers it")
    run = f"{size / 1e9:.1f} billion parameters and {tokens / 1e12:.2f} trillion tokens"
    report.table(columns, rows, f"The run of {run}, left out")
    return [Check("loss of the longest run, left out and predicted, absolute", 1, errors[True], 0.02)]
