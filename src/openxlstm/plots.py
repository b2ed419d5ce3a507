"""Pictures. The only module that imports matplotlib, when something is drawn, without a display."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openxlstm.runtime import atomic_write_bytes

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAINING, VALIDATION = "#2f6fde", "#d9480f"
BASELINES = ("#2b8a3e", "#862e9c", "#b08900", "#0b7285", "#a61e4d")
COLORS = (TRAINING, VALIDATION, *BASELINES)


def plot_loss_curve(
    log: str | Path | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the learning curve of a run over its steps, with baselines as horizontal lines.

    The unit is bits per byte if the log has it, else nats per token.

    Args:
        log: a run's ``log.jsonl``, or its records.
        output: image file; the suffix (``.png``, ``.svg``, ``.pdf``) decides the format.
        baselines: name to value, in the unit of the curve.
        title: heading.

    Returns:
        ``output`` as a path.

    Raises:
        FileNotFoundError: the log does not exist.
        ValueError: the log has no training or validation record.
        ImportError: matplotlib is not installed (``pip install 'openxlstm[train]'``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = _read(log) if isinstance(log, (str, Path)) else list(log)
    unit = "bits_per_byte" if any("bits_per_byte" in record for record in records) else "loss"
    training = _series(records, "train", unit)
    validation = _series(records, "validation", unit)
    if not training and not validation:
        raise ValueError("the log has no training or validation record, so there is no curve to draw")

    figure = Figure(figsize=(8.5, 5.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, values = zip(*training, strict=True)
        axes.plot(steps, values, color=TRAINING, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=TRAINING, linewidth=1.8, label="training (smoothed)")
    if validation:
        steps, values = zip(*validation, strict=True)
        label = f"validation: {values[-1]:.3f} at the end"
        axes.plot(steps, values, color=VALIDATION, linewidth=1.8, marker="o", markersize=3.5, label=label)
    for index, (name, value) in enumerate((baselines or {}).items()):
        color = BASELINES[index % len(BASELINES)]
        axes.axhline(value, color=color, linewidth=1.3, linestyle=(0, (5, 3)), label=f"{name}: {value:.3f}")

    shown = [value for _, value in validation] + list((baselines or {}).values())
    shown += _smooth([value for _, value in training])
    axes.set_ylim(*_limits(shown))
    axes.set_xlim(left=0)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("bits per byte" if unit == "bits_per_byte" else "loss (nats per token)", color=INK)
    _style(axes)
    if title:
        axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.legend(frameon=False, labelcolor=INK)

    output = Path(output)
    _write(figure, output)
    return output


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    output: str | Path,
    *,
    x_label: str,
    y_label: str,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    title: str | None = None,
    x_log: bool = False,
    y_log: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> Path:
    """Draw named lines of (x, y) points, with optional bands of (x, low, high) under the same names.

    Args:
        lines: name to points, drawn in order.
        output: image file; the suffix decides the format.
        x_label, y_label, title: texts.
        bands: uncertainty around lines.
        x_log, y_log: logarithmic axes; ``x`` to base 2.
        y_limits: range of the vertical axis.

    Raises:
        ValueError: no points at all.
        ImportError: matplotlib is not installed.
    """
    if not any(lines.values()):
        raise ValueError("there are no points to draw")
    figure, axes = _canvas((8.5, 5.0))
    for index, (name, points) in enumerate(lines.items()):
        color, dashes = COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(
            xs, ys, dashes, color=color, linewidth=1.6, marker="o" if len(xs) < 24 else "", markersize=3.5
        )
        axes.lines[-1].set_label(name)
        for x, low, high in (bands or {}).get(name, ()):
            axes.plot([x, x], [low, high], color=color, linewidth=1.2, alpha=0.6)
    if x_log:
        axes.set_xscale("log", base=2)
    if y_log:
        axes.set_yscale("log")
    if y_limits:
        axes.set_ylim(*y_limits)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    _style(axes)
    if title:
        axes.set_title(title, loc="left", color=INK, fontweight="bold")
    if len(lines) > 1 or "" not in lines:
        axes.legend(frameon=False, labelcolor=INK, fontsize="small")
    return _write(figure, Path(output))


def plot_matrix(
    values: Sequence[Sequence[float | None]],
    output: str | Path,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    x_label: str = "",
    y_label: str = "",
    title: str | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    numbers: bool = True,
) -> Path:
    """Draw a matrix as coloured cells, light to dark; None is a missing value.

    Args:
        values: rows of numbers.
        output: image file; the suffix decides the format.
        rows, columns: labels; none leaves the axis without.
        x_label, y_label, title: texts.
        limits: values of the lightest and the darkest colour.
        numbers: write the value into each cell.

    Raises:
        ValueError: no values.
        ImportError: matplotlib is not installed.
    """
    if not values or not values[0]:
        raise ValueError("there are no values to draw")
    width, height = len(values[0]), len(values)
    size = (2.4 + 0.95 * width, 1.4 + 0.42 * height) if numbers else (8.5, 4.2)
    figure, axes = _canvas(size)
    cells = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(cells, cmap="Blues", vmin=limits[0], vmax=limits[1], aspect="auto")
    if numbers:
        middle = (limits[0] + limits[1]) / 2
        for r, row in enumerate(values):
            for c, value in enumerate(row):
                if value is not None:
                    color = "white" if value > middle else INK
                    axes.text(
                        c,
                        r,
                        f"{value + 0.0:.2f}".replace("-0.00", "0.00"),
                        ha="center",
                        va="center",
                        color=color,
                        fontsize="small",
                    )
    else:
        figure.colorbar(image, ax=axes)
    for labels, ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        if labels:
            ticks(range(len(labels)), labels)
    if columns:
        axes.tick_params(axis="x", rotation=30 if max(map(len, columns)) > 8 else 0)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    _style(axes, grid=False)
    if title:
        axes.set_title(title, loc="left", color=INK, fontweight="bold")
    return _write(figure, Path(output))


def _canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure without a display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _style(axes: Any, *, grid: bool = True) -> None:
    """Quiet axes."""
    if grid:
        axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _write(figure: Any, output: Path) -> Path:
    """Save the figure in the format that the suffix names, PNG without one."""
    image = io.BytesIO()
    figure.savefig(image, format=output.suffix.lstrip(".") or "png")
    atomic_write_bytes(output, image.getvalue())
    return output


@dataclass(frozen=True)
class Series:
    """Points and lines of a chart under one name."""

    x: Any
    """Numbers, as a list or an array."""
    y: Any
    """As many."""
    label: str = ""
    """Name in the legend; empty for none."""
    style: Literal["points", "line", "both", "dashed", "star"] = "points"
    color: int = 0
    """Index into :data:`COLORS`, counted around."""
    low: Any = None
    """Lower end of a band around y."""
    high: Any = None
    """Upper end of a band around y."""


@dataclass(frozen=True)
class Chart:
    """One panel: titled axes with series."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = True
    log_y: bool = False


def draw_charts(charts: Sequence[Chart], columns: int = 2) -> bytes:
    """Draw charts side by side as one PNG image.

    Raises:
        ValueError: no charts.
        ImportError: matplotlib is not installed (``pip install 'openxlstm[scaling]'``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    if not charts:
        raise ValueError("there are no charts to draw")
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.9 * rows), dpi=105, layout="constrained")
    FigureCanvasAgg(figure)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, index + 1)
        for series in chart.series:
            _draw_series(axes, series)
        if chart.log_x:
            axes.set_xscale("log")
            if max(axes.get_xlim()) > 8 * min(axes.get_xlim()):  # labels between the powers would collide
                axes.xaxis.set_minor_formatter(NullFormatter())
        if chart.log_y:
            axes.set_yscale("log")
        _style(axes)
        axes.set_xlabel(chart.x_label, color=INK)
        axes.set_ylabel(chart.y_label, color=INK)
        axes.set_title(chart.title, loc="left", color=INK, fontweight="bold", fontsize=10.5)
        if any(series.label for series in chart.series):
            axes.legend(frameon=False, labelcolor=INK, fontsize=7.5)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_series(axes: Any, series: Series) -> None:
    color = COLORS[series.color % len(COLORS)]
    options: dict[str, Any] = {
        "points": {"linestyle": "none", "marker": "o", "markersize": 3.5, "alpha": 0.75},
        "line": {"linewidth": 1.5},
        "both": {"linewidth": 1.3, "marker": "o", "markersize": 3.5},
        "dashed": {"linewidth": 1.3, "linestyle": (0, (4, 2.5))},
        "star": {"linestyle": "none", "marker": "*", "markersize": 12, "markeredgecolor": "white"},
    }[series.style]
    axes.plot(series.x, series.y, color=color, label=series.label or None, **options)
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.13, linewidth=0)


def _read(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file; lines that are not JSON (cut short by a crash) are left out."""
    records: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _series(records: Sequence[Mapping[str, Any]], kind: str, unit: str) -> list[tuple[int, float]]:
    """(step, value) of the records of ``kind`` that have a value."""
    return [
        (record["step"], record[unit])
        for record in records
        if record.get("kind") == kind and isinstance(record.get(unit), (int, float))
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over a few percent of the curve, without the bias of its first values."""
    rate = min(1.0, 25 / max(len(values), 1))
    mean = weight = 0.0
    result: list[float] = []
    for value in values:
        mean += rate * (value - mean)
        weight += rate * (1 - weight)
        result.append(mean / weight)
    return result


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Range of the vertical axis: what matters is the end of the curve, so a high start may be cut off."""
    low, ordered = min(values), sorted(values)
    high = max(ordered[int(0.97 * (len(ordered) - 1))], low + 1e-3)
    margin = 0.06 * (high - low)
    return low - margin, high + 3 * margin
