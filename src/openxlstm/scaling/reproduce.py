"""The published xLSTM scaling study again, from its published measurements (Beck et al., arXiv 2510.02228).

DATA is a directory with ``training_runs.parquet`` or ``.csv`` and, as far as there are any,
``inference_measurements.parquet`` and the reference results ``ref_isoflop_polyfits.csv``,
``ref_power_laws.csv``, ``ref_tokenparam_slopes.csv``, ``ref_parametric_fits.csv``, ``ref_runtime_fits.csv``.
Every value is shown beside the reference. Where the runs behind a result are not all in the table, the
reference optima are taken as input and the row says so.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openxlstm.models import TransformerLMConfig, parameter_count, xLSTMLargeConfig
from openxlstm.models.accounting import Counting, training_flops_per_token
from openxlstm.plots import Chart, Series
from openxlstm.scaling.data import Table, read_measurements, read_runs, read_table
from openxlstm.scaling.inference_time import TimeModel, fit_measurements, measured_cost
from openxlstm.scaling.isoflop import IsoFlopFit, isoflop_profiles
from openxlstm.scaling.parametric import ParametricFit, bootstrap, fit_parametric, fit_runs
from openxlstm.scaling.power_law import fit_power_law, overtraining_slopes
from openxlstm.scaling.report import Report, relative

VOCABULARY = 50304
FAMILIES = {"mlstm": "xLSTM", "llama": "Transformer"}
CONTEXTS = (2048, 8192, 16384)
BUDGETS = {2048: (6e18, 1e19, 3e19), 8192: (6e18, 1e19, 3e19, 1e20), 16384: (6e18, 1e19, 3e19)}
EXPERIMENTS = {"all": ("tokenparam", "isoflop"), "isoflop": ("isoflop",), "tokenparam": ("tokenparam",)}
SHAPE = ("embedding_dim", "num_heads", "num_blocks")
Notify = Callable[[str], None]


@dataclass
class Inputs:
    """What the directory holds; missing references are None."""

    all_runs: Table
    """Also those without a loss."""
    runs: Table
    measurements: Table | None
    optima: Table | None
    laws: Table | None
    slopes: Table | None
    parametric: Table | None
    times: Table | None


def read_inputs(directory: Path) -> Inputs:
    """Read the directory.

    Raises:
        FileNotFoundError: no such directory, or no table of runs in it.
        ValueError: a table lacks columns.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"directory '{directory}' does not exist")
    path = next((p for s in ("parquet", "csv") if (p := directory / f"training_runs.{s}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"'{directory}' holds neither training_runs.parquet nor training_runs.csv")
    needed = ("experiment", "preset_ratio", *SHAPE, "ffn_dim", "chunk_size", "global_batch_size", "num_steps")
    everything = read_table(path, needed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report counts what was left out
        runs = read_runs(path)

    def reference(name: str, *columns: str) -> Table | None:
        file = directory / f"ref_{name}.csv"
        return read_table(file, columns) if file.is_file() else None

    measured = directory / "inference_measurements.parquet"
    return Inputs(
        everything[everything["flops"].notna()],
        runs,
        read_measurements(measured) if measured.is_file() else None,
        reference("isoflop_polyfits", "isoflop_tag", "x_opt", "y_opt", "context_length", "model", "x"),
        reference("power_laws", "plot_type", "context_length", "alpha", "a", "model", "num_points_fit"),
        reference("tokenparam_slopes", "slope", "model", "token_param_ratio"),
        reference("parametric_fits", "huber_delta", "fit_gamma", "model", "experiment_set", "objective"),
        reference("runtime_fits", "model", "quantity", "size"),
    )


def reproduce(directory: Path, notify: Notify = lambda _: None) -> Report:
    """Fit everything and report it; errors as for :func:`read_inputs`."""
    start = time.perf_counter()
    inputs = read_inputs(directory)
    report = Report("xLSTM scaling laws: the published study, reproduced")
    report.text(
        "Fits of the published measurements (arXiv 2510.02228), each beside the published result. "
        "Differences are relative unless stated otherwise."
    )
    steps: list[tuple[str, Callable[[Report, Inputs], None]]] = [
        ("parameters and FLOPs", _accounting),
        ("IsoFLOP profiles", _profiles),
        ("optimal size and tokens", _laws),
        ("over-training", _overtraining),
        ("loss against compute", _pareto),
        ("parametric laws", _parametric),
        ("a prediction", _held_out),
        ("inference times", _times),
    ]
    for name, step in steps:
        begun = time.perf_counter()
        step(report, inputs)
        notify(f"{name:<24} {time.perf_counter() - begun:6.1f} s")
    report.text(f"Computed in {time.perf_counter() - start:.0f} seconds.")
    return report


def profile_runs(runs: Table, model: str, context: int) -> Table:
    """The complete IsoFLOP runs of one family and context."""
    chosen = (runs["model"] == model) & (runs["context_length"] == context)
    return runs[chosen & (runs["experiment"] == "isoflop")]


def profiles_of(inputs: Inputs, model: str, context: int, variable: Any) -> list[IsoFlopFit]:
    """Profiles of the complete runs; none where the runs are not in the table."""
    table = profile_runs(inputs.runs, model, context)
    return isoflop_profiles(table, BUDGETS[context], variable) if len(table) else []


def _accounting(report: Report, inputs: Inputs) -> None:
    parameters, flops = [], []
    for _, row in inputs.all_runs.iterrows():
        width, heads, blocks = (int(row[name]) for name in SHAPE)
        if row["model"] == "mlstm":
            chunk = int(row["chunk_size"])
            config = xLSTMLargeConfig(
                width, heads, blocks, VOCABULARY, ffn_dim=int(row["ffn_dim"]), chunk_size=chunk
            )
        else:
            config = TransformerLMConfig(width, heads, blocks, VOCABULARY, ffn_dim=int(row["ffn_dim"]))
        chinchilla = row["experiment"] == "isoflop_chinchilla_extra"
        counting = Counting(attention="chinchilla" if chinchilla else "distill")
        context = int(row["context_length"])
        tokens = row["global_batch_size"] * context * row["num_steps"]
        counted = training_flops_per_token(config, context, counting) * tokens
        parameters.append(parameter_count(config) / row["num_params"] - 1)
        flops.append(counted / row["flops"] - 1)
    report.heading("Parameters and FLOPs")
    report.table(
        ("quantity", "runs", "largest relative difference"),
        [(n, len(v), float(np.abs(v).max())) for n, v in (("parameters", parameters), ("FLOPs", flops))],
        "Counted from the configuration of every complete run",
    )


def _profiles(report: Report, inputs: Inputs) -> None:
    report.heading("IsoFLOP profiles")
    rows, charts = [], []
    for context in CONTEXTS:
        for model, name in FAMILIES.items():
            for variable in ("num_params", "num_tokens"):
                fits = profiles_of(inputs, model, context, variable)
                for fit in fits:
                    known = _reference_optimum(inputs, model, context, variable, fit.budget)
                    rows.append(
                        (name, context, _label(variable), f"{fit.budget:.0e}", fit.optimum,
                         None if known is None else known["x_opt"],
                         "" if known is None else relative(fit.optimum, known["x_opt"]), fit.loss,
                         "" if known is None else relative(fit.loss, known["y_opt"]), fit.count)
                    )  # fmt: skip
                if fits and variable == "num_params":
                    charts.append(_profile_chart(inputs, model, context, fits))
    columns = (
        "family",
        "context",
        "of",
        "budget",
        "optimum",
        "reference",
        "difference",
        "loss",
        "difference",
    )
    report.table((*columns, "runs"), rows, "Minima of parabolas in log10, where the complete runs are there")
    if charts:
        report.figure(charts)


def _profile_chart(inputs: Inputs, model: str, context: int, fits: list[IsoFlopFit]) -> Chart:
    table = profile_runs(inputs.runs, model, context)
    series: list[Series] = []
    for color, fit in enumerate(fits):
        group = table[(table["flops"] / fit.budget - 1).abs() <= 0.1].sort_values("num_params")
        x = group["num_params"].to_numpy()
        curve = np.geomspace(x.min(), x.max(), 50)
        series.append(Series(x, group["val_loss"].to_numpy(), f"{fit.budget:.0e} FLOPs", "points", color))
        series.append(Series(curve, fit(curve), "", "dashed", color))
        series.append(Series([fit.optimum], [fit.loss], "", "star", color))
    return Chart(f"{FAMILIES[model]}, context {context}", "parameters", "validation loss", series)


def _reference_optimum(inputs: Inputs, model: str, context: int, variable: str, budget: float) -> Any:
    table = inputs.optima
    if table is None:
        return None
    rows = table[
        (table["model"] == model)
        & (table["context_length"] == context)
        & (table["x"] == variable)
        & ((table["isoflop_tag"].astype(float) / budget - 1).abs() < 1e-6)
    ]
    return rows.iloc[0] if len(rows) else None


def optimum_points(inputs: Inputs, model: str, context: int, variable: str) -> tuple[Any, Any, str]:
    """FLOPs and optima of the budgets up to 1e20, and where they come from ("" if from nowhere)."""
    fits = profiles_of(inputs, model, context, variable)
    if fits:
        return [f.flops for f in fits], [f.optimum for f in fits], "runs"
    if inputs.optima is not None:
        table = inputs.optima
        rows = table[
            (table["model"] == model)
            & (table["context_length"] == context)
            & (table["x"] == variable)
            & (table["flops_mean"] < 2e20)
        ]
        if len(rows) >= 2:
            return rows["flops_mean"].to_numpy(), rows["x_opt"].to_numpy(), "reference optima"
    return [], [], ""


def _laws(report: Report, inputs: Inputs) -> None:
    report.heading("Optimal size and tokens against compute")
    rows, charts, missing = [], [], []
    for variable in ("num_params", "num_tokens"):
        series: list[Series] = []
        for index, (context, model) in enumerate((c, m) for c in CONTEXTS for m in FAMILIES):
            flops, optima, source = optimum_points(inputs, model, context, variable)
            if not source:
                known = _reference_law(inputs, model, context, variable)
                published = "" if known is None else f" (published exponent {known:.4f})"
                missing.append(f"{FAMILIES[model]}, context {context}, {_label(variable)}{published}")
                continue
            law = fit_power_law(flops, optima)
            known = _reference_law(inputs, model, context, variable)
            low, high = law.exponent_interval()
            rows.append(
                (FAMILIES[model], context, _label(variable), law.exponent, f"{low:.3f} to {high:.3f}",
                 known, None if known is None else f"{law.exponent - known:+.1e}", law.coefficient, source)
            )  # fmt: skip
            x = np.geomspace(law.low, law.high, 20)
            name = f"{FAMILIES[model]} {context}: {law.exponent:.3f}"
            series += [Series(flops, optima, name, "points", index), Series(x, law(x), "", "dashed", index)]
        charts.append(Chart(f"optimal {_label(variable)}", "FLOPs", _label(variable), series, log_y=True))
    columns = ("family", "context", "of", "exponent", "95 % interval", "reference", "difference (absolute)")
    report.table(
        (*columns, "coefficient", "from"), rows, "Power laws through the optima of budgets up to 1e20"
    )
    if missing:
        report.notes(
            [f"neither complete runs nor enough reference optima for {m}: left out" for m in missing]
        )
    report.figure(charts)


def _reference_law(inputs: Inputs, model: str, context: int, variable: str) -> float | None:
    table = inputs.laws
    if table is None:
        return None
    kind = "num_params" if variable == "num_params" else "num_tokens_training"
    chosen = (table["model"] == model) & (table["context_length"] == context) & (table["plot_type"] == kind)
    return float(table[chosen]["alpha"].iloc[0]) if chosen.any() else None


def _label(variable: str) -> str:
    return "parameters" if variable == "num_params" else "tokens"


def tokenparam(inputs: Inputs, model: str) -> Table:
    """The over-training runs of one family."""
    return inputs.runs[(inputs.runs["model"] == model) & (inputs.runs["experiment"] == "tokenparam")]


def _overtraining(report: Report, inputs: Inputs) -> None:
    report.heading("Over-training")
    rows, charts = [], []
    for model, name in FAMILIES.items():
        table = tokenparam(inputs, model)
        series: list[Series] = []
        fits = overtraining_slopes(table)
        for color, ratio in enumerate(sorted(fits, key=float)):
            law, known = fits[ratio], _reference_slope(inputs, model, float(ratio))
            low, high = law.exponent_interval()
            interval = f"{low:.4f} to {high:.4f}" if law.count > 2 else "two runs"
            difference = None if known is None else f"{law.exponent - known:+.1e}"
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


def _reference_slope(inputs: Inputs, model: str, ratio: float) -> float | None:
    table = inputs.slopes
    if table is None:
        return None
    chosen = (table["model"] == model) & (table["token_param_ratio"] == ratio)
    return float(table[chosen]["slope"].iloc[0]) if chosen.any() else None


def _pareto(report: Report, inputs: Inputs) -> None:
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


def parametric_cell(runs: Table, row: Any) -> Table:
    """The runs of one reference fit: family, experiments, range of tokens per parameter, context 8192."""
    low, high = (float(bound) for bound in row["token_param_range"].split("-"))
    table = runs[(runs["model"] == row["model"]) & (runs["context_length"] == 8192)]
    table = table[table["experiment"].isin(EXPERIMENTS[row["experiment_set"]])]
    ratio = table["num_tokens"] / table["num_params"]
    return table[(ratio >= low) & (ratio <= high)]


def _parametric(report: Report, inputs: Inputs) -> None:
    report.heading("Parametric laws L(N, D) = E + (A N^-α + B D^-β)^γ")
    if inputs.parametric is None:
        rows = []
        for model, name in FAMILIES.items():
            for free in (False, True):
                fit = fit_runs(tokenparam(inputs, model), free_gamma=free)
                rows.append(
                    (name, "free" if free else "1", fit.objective, *fit.constants.values(), fit.r_squared)
                )
        report.table(("family", "gamma", "objective", "E", "A", "B", "α", "β", "γ", "R²"), rows)
        return
    table = inputs.parametric
    usable = table[table["raw_data_available"]] if "raw_data_available" in table.columns else table
    rows, worst, notes = [], -np.inf, []
    keys = ["model", "experiment_set", "token_param_range", "fit_gamma"]
    for _, group in usable.groupby(keys):
        extra: list[Any] = []  # neighbouring deltas start from each other
        for _, row in group.sort_values("huber_delta", ascending=False).iterrows():
            fit = _fit_cell(inputs.runs, row, extra)
            extra = [fit.parameters]
            worst = max(worst, fit.objective / row["objective"] - 1)
            rows.append(_parametric_row(fit, row))
            notes += [
                f"{FAMILIES[row['model']]}, {row['experiment_set']} {row['token_param_range']}, "
                f"delta {row['huber_delta']:g}, gamma {'free' if row['fit_gamma'] else '1'}: {note}"
                for note in fit.diagnostics()
            ]
    report.text(
        f"{len(rows)} of {len(table)} published fits have all their runs in the table. Objective relative to "
        f"the published optimum: at most {worst:+.1e}; below zero means better than published."
    )
    columns = (
        "family",
        "runs",
        "tokens/N",
        "δ",
        "γ",
        "objective",
        "difference",
        "α",
        "ref.",
        "β",
        "ref.",
        "E",
    )
    report.table((*columns, "ref.", "γ", "ref.", "largest difference of a predicted loss", "R²"), rows)
    if notes:
        report.text(f"Diagnostics ({len(notes)} remarks on {len(rows)} fits; the first 20):")
        report.notes(notes[:20])


def _fit_cell(runs: Table, row: Any, extra: list[Any]) -> ParametricFit:
    table = parametric_cell(runs, row)
    sizes, tokens, losses = (table[name].to_numpy() for name in ("num_params", "num_tokens", "val_loss"))
    options = {"delta": float(row["huber_delta"]), "free_gamma": bool(row["fit_gamma"])}
    return fit_parametric(sizes, tokens, losses, **options, starts=320, polish=8, extra_starts=extra)


def _parametric_row(fit: ParametricFit, row: Any) -> tuple[Any, ...]:
    names = ("a", "b", "e", "alpha", "beta", "gamma")
    a, b, e, alpha, beta, gamma = (float(row[name]) for name in names)
    known = ParametricFit(
        (a, b, e, alpha, beta, gamma), 0.0, fit.delta, True, fit.num_params, fit.num_tokens, fit.losses
    )
    points = fit.num_params, fit.num_tokens
    difference = float(np.abs(fit(*points) - known(*points)).max())
    return (
        FAMILIES[row["model"]], row["experiment_set"], row["token_param_range"], f"{row['huber_delta']:g}",
        "free" if row["fit_gamma"] else "1", fit.objective, relative(fit.objective, row["objective"]),
        fit.alpha, alpha, fit.beta, beta, fit.constants["E"], float(np.exp(e)), fit.gamma, gamma,
        f"{difference:.1e}", fit.r_squared,
    )  # fmt: skip


def _held_out(report: Report, inputs: Inputs) -> None:
    """The longest xLSTM run, predicted from the others."""
    table = tokenparam(inputs, "mlstm")
    long = table["num_tokens"].idxmax()
    size, tokens, loss = (float(table.loc[long, n]) for n in ("num_params", "num_tokens", "val_loss"))
    report.heading("A prediction")
    rows = []
    for free in (True, False):
        fit = bootstrap(fit_runs(table.drop(long), free_gamma=free), 400)
        low, high = fit.interval(size, tokens)
        predicted = float(fit(size, tokens))
        covered = "yes" if low < loss < high else "no"
        interval = f"{low:.4f} to {high:.4f}"
        rows.append(("free" if free else "1", predicted, loss, f"{predicted - loss:+.4f}", interval, covered))
    columns = ("gamma", "predicted loss", "measured", "error", "95 % prediction interval", "covers it")
    caption = (
        f"The run of {size / 1e9:.1f} billion parameters and {tokens / 1e12:.2f} trillion tokens, left out"
    )
    report.table(columns, rows, caption)


def _times(report: Report, inputs: Inputs) -> None:
    if inputs.measurements is None:
        return
    report.heading("Inference times on one H100")
    names = {"ttft": "time to first token", "steptime": "time of one step"}
    for quantity, title in names.items():
        models = fit_measurements(inputs.measurements, quantity)
        rows = [
            _time_row(inputs, quantity, key, model) for key, model in sorted(models.items(), key=_by_size)
        ]
        columns = (
            "family",
            "size",
            "rate (per s)",
            "reference",
            "difference",
            "latency (ms)",
            "per row (ms)",
        )
        report.table((*columns, "median relative error", "measurements"), rows, title)
        charts = [_time_chart(inputs, quantity, title, family, models) for family in ("xlstm", "llama2")]
        report.figure(charts)


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
        "xLSTM" if key[0] == "xlstm" else "Transformer", key[1], model.rate, known,
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
    name = "xLSTM" if family == "xlstm" else "Transformer"
    return Chart(f"{name}: {title}, batch {batch}", "tokens before", "milliseconds", series, log_y=True)
