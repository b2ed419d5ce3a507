"""The loss curve: drawn without a display, from a log or records, with and without baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from openxlstm.plots import _limits, _smooth, plot_loss_curve

PNG = b"\x89PNG"


def records(unit: str = "bits_per_byte", steps: int = 300) -> list[dict[str, object]]:
    curve = [
        {"kind": "train", "step": n, "loss": 1.0, unit: 8 * math.exp(-n / 60) + 2 + 0.1 * math.sin(n)}
        for n in range(1, steps + 1)
    ]
    validation = [{"kind": "validation", "step": n, "loss": 1.0, unit: 8 * math.exp(-n / 60) + 2.1}
                  for n in range(50, steps + 1, 50)]  # fmt: skip
    return [{"kind": "start", "step": 0}, *curve, *validation]


def test_draws_a_curve_with_baselines(tmp_path: Path) -> None:
    path = plot_loss_curve(
        records(), tmp_path / "loss.png", baselines={"gzip -9": 2.4, "byte 5-gram": 2.2}, title="demo"
    )
    assert path.read_bytes().startswith(PNG)
    assert len(path.read_bytes()) > 10_000


def test_reads_a_log_whose_last_line_was_cut_short(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records("loss", 20)) + '{"kind": "tra')
    assert plot_loss_curve(log, tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert plot_loss_curve(log, tmp_path / "loss.svg").read_text().lstrip().startswith("<?xml")


def test_one_point_is_enough_and_none_is_refused(tmp_path: Path) -> None:
    plot_loss_curve([{"kind": "train", "step": 1, "loss": 3.0}], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="no curve to draw"):
        plot_loss_curve([{"kind": "start", "step": 0}], tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_loss_curve(tmp_path / "absent.jsonl", tmp_path / "other.png")


def test_smoothing_keeps_a_constant_and_follows_a_short_curve() -> None:
    assert _smooth([2.0] * 400) == pytest.approx([2.0] * 400)
    assert _smooth([3.0, 1.0]) == [3.0, 1.0]


def test_limits_contain_all_baselines_but_not_the_peak() -> None:
    low, high = _limits([2.0] * 200 + [50.0])
    assert low < 2.0 < high < 50.0
