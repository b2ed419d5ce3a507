"""Self-contained HTML reports: headings, paragraphs, tables and embedded figures, nothing to load."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openxlstm.plots import Chart, draw_charts
from openxlstm.runtime import atomic_write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933;
  max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #e4e7eb }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
caption { text-align: left; color: #52606d }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e4e7eb } th { background: #f5f7fa }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
.note { background: #fff9db; padding: .5em 1em; border-left: 4px solid #fab005 }
"""


class Report:
    """Collects parts and writes one HTML file.

    Args:
        title: heading and title of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def notes(self, notes: Sequence[str]) -> None:
        """Sentences that a reader must not miss; nothing if there are none."""
        if notes:
            items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
            self._parts.append(f'<ul class="note">{items}</ul>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """A table; numbers are shown with about five digits."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(shown(value))}</td>" for value in row) + "</tr>"
            for row in rows
        )
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(f"<table>{title}<tr>{head}</tr>{body}</table>")

    def figure(self, charts: Sequence[Chart], columns: int = 2) -> None:
        """Charts as one embedded image."""
        image = base64.b64encode(draw_charts(charts, columns)).decode()
        names = html.escape("; ".join(chart.title for chart in charts))
        self._parts.append(f'<p><img alt="{names}" src="data:image/png;base64,{image}"></p>')

    def append(self, other: Report) -> None:
        """The sections of another report, without its title."""
        self._parts += other._parts[1:]

    def render(self) -> str:
        """The page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title>"
            f"<style>{STYLE}</style></head><body>{''.join(self._parts)}</body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, self.render())
        return path


def shown(value: Any) -> str:
    """A number in about five digits, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}" if abs(value) < 1e7 else f"{value:.4g}"
    if not math.isfinite(value):
        return "∞" if value > 0 else ("-∞" if value < 0 else "–")
    return f"{value:.5g}"


def relative(value: float, reference: float) -> str:
    """Relative difference of ``value`` from ``reference``."""
    return f"{value / reference - 1:+.1e}"
