"""The log: whole lines, cut back on resuming, readable after a crash."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openxlstm.training import read_log
from openxlstm.training.logging import RunLog


def open_log(directory: Path | None, step: int = 0) -> RunLog:
    return RunLog(directory, steps=10, step=step, tensorboard=False, progress=False)


def write_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write("train", step, {"loss": 1 / step})
    log.sync()
    log.close()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write_steps(open_log(tmp_path), 1, 8)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 9, "lo')
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == list(range(1, 9))
    write_steps(open_log(tmp_path, step=5), 6, 10)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == list(range(1, 11))
    open_log(tmp_path).close()
    assert read_log(tmp_path / "log.jsonl") == []


def test_numbers_that_json_lacks_and_letters_that_ascii_lacks(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write("validation", 1, {"loss": float("nan"), "text": "grüße\u2028"})
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [
        {"kind": "validation", "step": 1, "loss": None, "text": "grüße\u2028"}
    ]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnot json\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is not a log record"):
        read_log(path)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    write_steps(open_log(None), 1, 3)
    assert not list(tmp_path.iterdir())


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, steps=3, tensorboard=True, progress=False)
    write_steps(log, 1, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


def test_the_bar_shows_loss_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, steps=3, tensorboard=False, progress=True)
    log.advance(2.0, {"tokens_per_second": 123.4, "utilisation": 0.25})
    log.advance(2.0, {})
    log.close()
    shown = capsys.readouterr().err
    assert "loss=2.000" in shown
    assert "tok/s=123" in shown
    assert "MFU=25%" in shown
