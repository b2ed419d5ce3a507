"""The log of a run: one JSON object per line, always; TensorBoard and a progress bar beside it.

Every line has ``kind`` (``"start"``, ``"train"``, ``"validation"``, ``"sample"``, ``"resume"``) and ``step``.
The values depend on the seed alone except for :data:`TIMINGS`, so an interrupted and resumed run has the same
log as one that ran through: on resuming, lines beyond the checkpoint are dropped before new ones are
appended.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from openxlstm.runtime import atomic_write_text

TIMINGS = ("tokens_per_second", "utilisation", "seconds")
"""Fields that differ between two runs of the same settings."""


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log, in order; a last line that a crash cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            if number == len(lines) - 1:  # no line end: the write was cut short
                break
            raise ValueError(f"line {number + 1} of '{path}' is not a log record") from None
        records.append(record)
    return records


class RunLog:
    """Writes ``log.jsonl``, TensorBoard events and the progress bar of a run.

    Args:
        directory: the run's directory; created. None (for processes other than the first): write nothing.
        steps: updates in the whole run.
        step: updates already done; records beyond it are dropped.
        tensorboard: write TensorBoard events, if it is installed.
        progress: show a bar and messages on standard error.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        steps: int,
        step: int = 0,
        tensorboard: bool = True,
        progress: bool = True,
    ) -> None:
        self._file, self._writer = None, None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / "log.jsonl"
            if path.exists():
                kept = [r for r in read_log(path) if step and r.get("step", 0) <= step]
                atomic_write_text(path, "".join(map(_line, kept)))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            self._writer = _tensorboard_writer(directory / "tensorboard", step) if tensorboard else None
        self._bar: tqdm[Any] = tqdm(
            total=steps,
            initial=step,
            disable=directory is None or not progress,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        self._shown: dict[str, str] = {}
        self._smooth: float | None = None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record; it reaches the operating system before this returns."""
        if self._file is None:
            return
        self._file.write(_line({"kind": kind, "step": step, **values}))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
                elif kind == "sample":
                    self._writer.add_text(name, "\n\n---\n\n".join(value), step)

    def advance(self, loss: float, speed: Mapping[str, float]) -> None:
        """Move the bar by one update; show the smoothed loss and, when it is given, the ``speed``."""
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        self._shown["loss"] = f"{self._smooth:.3f}"
        if "tokens_per_second" in speed:
            self._shown["tok/s"] = f"{speed['tokens_per_second']:.0f}"
        if "utilisation" in speed:
            self._shown["MFU"] = f"{speed['utilisation']:.0%}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def sync(self) -> None:
        """Make everything written so far durable."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish all outputs."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    """One JSON line; numbers that JSON does not have become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def _tensorboard_writer(directory: Path, step: int) -> Any:
    """A writer that hides events after ``step``, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
