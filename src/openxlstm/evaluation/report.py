"""What a study found: a table with confidence intervals, plots, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openxlstm.evaluation.statistics import Estimate, estimate
from openxlstm.evaluation.study import span
from openxlstm.plots import plot_lines, plot_matrix
from openxlstm.runtime import atomic_write_text, environment_report, render_report

SOLVED = 0.95
"""Scaled accuracy from which a task counts as solved."""


class Row(NamedTuple):
    """All seeds of one network on one task."""

    task: str
    model: str
    width: int
    parameters: int
    steps: int
    seconds: Estimate
    loss: Estimate
    lengths: tuple[str, ...]
    accuracy: tuple[Estimate, ...]
    scaled: tuple[Estimate, ...]

    @property
    def headline(self) -> int:
        """Which range of lengths counts: the first beyond training, or the only one."""
        return min(1, len(self.lengths) - 1)

    @property
    def solved(self) -> bool:
        """Whether the mean scaled accuracy of the headline reaches :data:`SOLVED`."""
        return self.scaled[self.headline].mean >= SOLVED


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per task and setting of a network, over its seeds, in the order of the results."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        setting = {name: value for name, value in result["trial"].items() if name != "seed"}
        groups.setdefault(json.dumps(setting), []).append(result)
    rows: list[Row] = []
    for group in groups.values():
        trial, ranges = group[0]["trial"], range(len(group[0]["accuracy"]))
        rows.append(
            Row(
                trial["task"],
                trial["model"],
                trial["width"],
                group[0]["parameters"],
                trial["steps"],
                estimate([result["seconds"] for result in group]),
                estimate([result["final_loss"] for result in group]),
                tuple(span(part["lengths"]) for part in group[0]["accuracy"]),
                tuple(estimate([result["accuracy"][n]["accuracy"] for result in group]) for n in ranges),
                tuple(estimate([result["accuracy"][n]["scaled"] for result in group]) for n in ranges),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table per task."""
    parts: list[str] = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        lengths = mine[0].lengths
        head = ["model", "parameters", "seconds", *(f"accuracy {text}" for text in lengths)]
        head += [f"scaled {lengths[mine[0].headline]}", "solved"]
        body = [
            [
                row.model,
                f"{row.parameters:,}",
                f"{row.seconds.mean:.0f}",
                *(str(value) for value in row.accuracy),
                str(row.scaled[row.headline]),
                "yes" if row.solved else "no",
            ]
            for row in mine
        ]
        seeds, steps = mine[0].loss.runs, mine[0].steps
        parts.append(
            f"### {task}: {steps} steps, {seeds} seed{'s' if seeds > 1 else ''}\n\n{_markdown(head, body)}"
        )
    return "\n\n".join(parts)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in (head, *body)) for n in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write_report(
    results: Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    title: str,
    command: str,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.md``, ``results.csv``, plots and ``report.html`` into a directory.

    Args:
        results: of :func:`~openxlstm.evaluation.study.run_study`.
        output: the directory.
        title: heading.
        command: what regenerates the report, shown in it.
        notes: sentences to put before the tables.

    Returns:
        The HTML file.

    Raises:
        ValueError: no results.
        ImportError: matplotlib is not installed (``pip install 'openxlstm[eval]'``).
    """
    if not results:
        raise ValueError("there are no results to report")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(results)
    pictures = draw(results, rows, output)
    text = table(rows)
    notes = [*notes, _explanation(rows)]
    atomic_write_text(
        output / "report.md", f"# {title}\n\n`{command}`\n\n" + "\n".join(notes) + f"\n\n{text}\n"
    )
    atomic_write_text(output / "results.csv", _csv(results))
    page = _page(title, command, notes, rows, pictures)
    atomic_write_text(output / "report.html", page)
    return output / "report.html"


def _explanation(rows: Sequence[Row]) -> str:
    intervals = "; ± is half a 95 % confidence interval over seeds (Student's t)"
    return (
        "Accuracy is the share of right answers by length of the string; scaled accuracy is 0 for guessing "
        f"and 1 for no mistake; solved means at least {SOLVED} scaled"
        f"{'' if rows[0].loss.runs == 1 else intervals}."
    )


def draw(results: Sequence[Mapping[str, Any]], rows: Sequence[Row], output: Path) -> list[Path]:
    """The overview of tasks and networks, and per task accuracy by length and learning curves."""
    tasks, models = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("task", "model"))
    found = {(row.task, row.model): row.scaled[row.headline].mean for row in rows}
    pictures = [
        plot_matrix(
            [[found.get((task, model)) for task in tasks] for model in models],
            output / "overview.png",
            rows=models,
            columns=tasks,
            title="scaled accuracy",
        )
    ]
    for task in tasks:
        mine = [row for row in rows if row.task == task]
        if len(mine[0].lengths) > 1:
            ends = {row.model: [int(text.split("-")[-1]) for text in row.lengths] for row in mine}
            lines = {
                row.model: [(x, value.mean) for x, value in zip(ends[row.model], row.accuracy, strict=True)]
                for row in mine
            }
            bands = {
                row.model: [
                    (x, value.mean - value.half_width, value.mean + value.half_width)
                    for x, value in zip(ends[row.model], row.accuracy, strict=True)
                    if value.half_width is not None
                ]
                for row in mine
            }
            pictures.append(
                plot_lines(
                    lines,
                    output / f"{task}-lengths.png",
                    x_label="longest string of the range",
                    y_label="accuracy",
                    title=f"{task}: accuracy by length",
                    bands=bands,
                    x_log=True,
                    y_limits=(0, 1.03),
                )
            )
        curves = {
            row.model: _mean_curve(
                [r for r in results if (r["trial"]["task"], r["trial"]["model"]) == (task, row.model)]
            )
            for row in mine
        }
        pictures.append(
            plot_lines(
                curves,
                output / f"{task}-loss.png",
                x_label="step",
                y_label="training loss (nats per answer)",
                title=f"{task}: learning curves, mean over seeds",
                y_log=True,
            )
        )
    return pictures


def _mean_curve(results: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    curves = [result["curve"] for result in results]
    return [
        (points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=False)
    ]


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per trial and range of lengths."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["task", "model", "seed", "width", "parameters", "steps", "seconds", "lengths", "accuracy", "scaled"]
    )
    for result in results:
        trial = result["trial"]
        about = [trial[name] for name in ("task", "model", "seed", "width")]
        for part in result["accuracy"]:
            writer.writerow(
                [
                    *about,
                    result["parameters"],
                    trial["steps"],
                    result["seconds"],
                    span(part["lengths"]),
                    part["accuracy"],
                    part["scaled"],
                ]
            )
    return file.getvalue()


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left }
.yes { background: #dbe9ff }
img { max-width: 100% }
pre { background: #f5f7fa; padding: .8rem; overflow: auto }
"""


def _page(
    title: str, command: str, notes: Sequence[str], rows: Sequence[Row], pictures: Sequence[Path]
) -> str:
    """The whole report as one HTML file, pictures inside."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(command)}</pre>"]
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        head = ["model", "width", "parameters", "seconds", *(f"accuracy {t}" for t in mine[0].lengths)]
        head.append(f"scaled {mine[0].lengths[mine[0].headline]}")
        body.append(f"<h2>{html.escape(task)}</h2><p>{mine[0].steps} steps, {mine[0].loss.runs} seed(s)</p>")
        cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
        lines = [f"<tr>{cells}</tr>"]
        for row in mine:
            values = [row.model, str(row.width), f"{row.parameters:,}", f"{row.seconds.mean:.0f}"]
            values += [str(value) for value in (*row.accuracy, row.scaled[row.headline])]
            mark = ' class="yes"' if row.solved else ""
            lines.append(
                f"<tr{mark}>" + "".join(f"<td>{html.escape(text)}</td>" for text in values) + "</tr>"
            )
        body.append(f"<table>{''.join(lines)}</table>")
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<p><img alt="{picture.stem}" src="data:image/png;base64,{data}"></p>')
    body.append(f"<h2>Environment</h2><pre>{html.escape(render_report(environment_report()))}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n' + "\n".join(body) + "\n</html>\n"
