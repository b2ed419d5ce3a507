"""Published parametric fits that are no optimum, or have none: what is measured at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openxlstm.scaling.parametric import bootstrap
from openxlstm.scaling.report import Report, relative
from openxlstm.scaling.reproduction.cells import (
    AT_BOUND,
    DIFFERENT,
    SETTING,
    UNCONVERGED,
    Cell,
)

SAMPLES = 100
"""Bootstrap samples, which show how far the data determine E."""
MEANINGS = {
    AT_BOUND: "The objective falls as E falls, to the last: its slope by E is positive at both points, so "
    "the least objective is at E = 0, where a fit of ln E never arrives. Both E are zero to within "
    "{largest:.0e} nats; a percentage of them means nothing.",
    UNCONVERGED: "The published point is not stationary: Newton's step from it leads to our E and promises "
    "the decrease that we find. Continued from it with analytic gradients, the fit ends where ours does. To "
    "stay within 1 % of the published E a fit would have to stop above the minimum.",
    DIFFERENT: "The parameters differ, and neither reason explains it.",
    "": "Parameters without outer exponent are within 1 % of the published; our objective is lower by more "
    "than 1e-5 of it. At the smallest deltas the objective is almost a sum of absolute values, at whose "
    "kinks a quasi-Newton search with numeric gradients stops. Where 14 runs face six parameters, gamma "
    "grows without end and there is no minimum.",
}


def examine_published_points(report: Report, cells: Sequence[Cell]) -> None:
    """The cells by reason, with the measurements behind it."""
    for reason, meaning in MEANINGS.items():
        chosen = [cell for cell in cells if cell.reason == reason]
        if chosen:
            largest = max(fit.constants["E"] for cell in chosen for fit in (cell.fit, cell.published))
            title = reason or "a lower objective than the published"
            count = f"{len(chosen)} fit{'s' * (len(chosen) > 1)}"
            report.text(f"{count}: {title}. {meaning.format(largest=largest)}")
            _table(report, chosen)


def _table(report: Report, cells: Sequence[Cell]) -> None:
    columns = (
        "runs in it", "E published", "continued", "ours", "95 % of E by bootstrap",
        "objective at the published point", "continued", "ours", "Newton's decrement",
        "E after Newton's step", "gradient published", "ours", "slope by E published", "ours",
        "condition", "largest difference of a predicted loss",
    )  # fmt: skip
    rows = []
    for cell in cells:
        known, found = cell.at_published, cell.at_ours
        low, high = np.exp(bootstrap(cell.fit, SAMPLES).parameter_intervals()["e"])
        rows.append(
            (
                *cell.setting,
                len(cell.fit.losses),
                *(fit.constants["E"] for fit in (cell.published, cell.continued, cell.fit)),
                f"{low:.2g} to {high:.2g}",
                cell.published.objective,
                *(relative(f.objective, cell.published.objective) for f in (cell.continued, cell.fit)),
                _power(-known.decrement),
                known.e_ahead,
                *map(_power, (known.gradient, found.gradient, known.e_slope, found.e_slope, known.condition)),
                _power(cell.prediction_difference),
            )
        )
    caption = (
        "Gradient, slope by E (per nat) and Newton's decrement are relative to the objective; the condition "
        "number is that of the Hessian at the published point, scaled to a unit diagonal. A dash: the "
        "Hessian is not positive definite there."
    )
    report.table((*SETTING, *columns), rows, caption)


def _power(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1e}"
