"""The published xLSTM scaling study again, from its published measurements (Beck et al., arXiv 2510.02228).

DATA is a directory with ``training_runs.parquet`` or ``.csv`` and, as far as there are any,
``inference_measurements.parquet`` and the reference results ``ref_isoflop_polyfits.csv``,
``ref_power_laws.csv``, ``ref_tokenparam_slopes.csv``, ``ref_parametric_fits.csv``, ``ref_runtime_fits.csv``.
Every value is shown beside the reference, and a summary says how far they are apart. Where the runs behind a
result are not all in the table, the reference optima are taken as input and the row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from openxlstm.scaling.report import Report
from openxlstm.scaling.reproduction.checks import Check
from openxlstm.scaling.reproduction.counts import count_runs
from openxlstm.scaling.reproduction.inputs import Inputs, read_inputs
from openxlstm.scaling.reproduction.optima import fit_optima, fit_profiles
from openxlstm.scaling.reproduction.over_training import fit_slopes, pareto_front
from openxlstm.scaling.reproduction.parametric_laws import fit_laws, predict_longest_run
from openxlstm.scaling.reproduction.times import fit_times

TITLE = "xLSTM scaling laws: the published study, reproduced"
STEPS: dict[str, Callable[[Report, Inputs], list[Check]]] = {
    "parameters and FLOPs": count_runs,
    "IsoFLOP profiles": fit_profiles,
    "optimal size and tokens": fit_optima,
    "over-training": fit_slopes,
    "loss against compute": pareto_front,
    "parametric laws": fit_laws,
    "a prediction": predict_longest_run,
    "inference times": fit_times,
}


def reproduce(directory: Path, notify: Callable[[str], None] = lambda _: None) -> tuple[Report, list[Check]]:
    """Fit everything and report it.

    Args:
        directory: the measurements.
        notify: called with a line after each step.

    Returns:
        the report, and its summary: how far each kind of result is from the published one.

    Raises:
        FileNotFoundError: no such directory, or no table of runs in it.
        ValueError: a table lacks columns.
    """
    start = time.perf_counter()
    inputs = read_inputs(directory)
    sections, checks = Report(TITLE), []
    for name, step in STEPS.items():
        begun = time.perf_counter()
        checks += step(sections, inputs)
        notify(f"{name:<24} {time.perf_counter() - begun:6.1f} s")
    report = Report(TITLE)
    report.text(
        "Fits of the published measurements (arXiv 2510.02228), each beside the published result. "
        f"Differences are relative unless stated otherwise. Computed in {time.perf_counter() - start:.0f} "
        "seconds."
    )
    report.heading("Summary")
    report.table(
        ("against the published results", "values", "largest difference", "limit", "holds"),
        [(c.what, c.count, f"{c.largest:.1e}", f"{c.limit:g}", "yes" if c.holds else "no") for c in checks],
    )
    report.append(sections)
    return report, checks
