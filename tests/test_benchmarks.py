"""The benchmarks' own machinery: turns, tables, the notice of a busy machine. Nothing depends on speed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from openxlstm.inference import measurement

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ by name."""
    if not BENCHMARKS.is_dir():
        pytest.skip("no benchmarks/ beside the tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(("busy", "own", "noted"), [(10.0, 1.0, True), (10.0, 10.0, False)])
def test_a_busy_machine_is_said(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, busy: float, own: float, noted: bool
) -> None:
    seconds = iter(((0.0, 0.0), (busy, own)))
    monkeypatch.setattr(measurement, "cpu_seconds", lambda: next(seconds))
    harness = load("harness")
    result = harness.disturbance(harness.OtherLoad().cores())
    harness.warn("a part", result)
    assert ("the machine is busy" in capsys.readouterr().out) == result["disturbed"] == noted


def test_rows_of_every_table(load: Any) -> None:
    cpu, turns = load("cpu"), load("turns")
    for part in cpu.TABLES:
        rows = cpu.rows(part)
        assert len(rows) == len(set(rows)) > 4
        assert any(row.runtime == "openxlstm" for row in rows)
        for runtime in {row.runtime for row in rows}:
            assert (BENCHMARKS / "runtimes" / f"{runtime}.py").exists()
            assert runtime in turns.NAMES


def test_what_is_not_installed_is_skipped_with_a_line(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = load("turns")
    monkeypatch.setitem(turns.INSTALL, "llama_cpp", (("no_such_package",), "pip install it"))
    said: list[str] = []
    row = turns.Row("llama_cpp", "f16")
    assert turns.measure([row], size="xlstm-160m", threads=1, seconds=0.1, say=said.append) == {}
    assert said == ["skipped: llama.cpp: no_such_package not installed: pip install it"]


def test_a_turn(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = load("turns")
    monkeypatch.setattr(turns, "TURN", 0.02)
    monkeypatch.setattr(turns, "BURST", 0.001)
    called: list[str] = []
    work = turns.Work(lambda: called.append("call"), 2, lambda: called.append("restart"), flops=1e6)
    times, rates, others = turns._turn(work, warm=True)
    assert called[:2] == ["restart", "call"]
    assert len(times) == len(rates) >= 1
    assert others >= 0
    samples = turns.Samples(2, 1e6, [1.0, 2.0, 4.0], [1e6, 1e6, 1e6], [0.0, 0.2])
    result = samples.result()
    assert result["tokens_per_second"] == 1.0
    assert (result["slowest"], result["fastest"]) == (0.5, 2.0)
    assert result["share_of_bound"] == 0.5
    assert result["cores_used_by_others"] == 0.1


def test_llamas_are_as_large(load: Any) -> None:
    from openxlstm.cli.bench import SIZES
    from openxlstm.models import xLSTMLarge

    for name, llama in load("runtimes.sizes").LLAMAS.items():
        with torch.device("meta"):
            ours = sum(p.numel() for p in xLSTMLarge(SIZES[name]).parameters())
        assert abs(llama.parameters / ours - 1) < 0.012


def _report() -> dict[str, Any]:
    facts = {"date": "2026-01-01", "cpu": "a CPU", "cpu_capability": "AVX2", "threads": 2, "versions": {}}

    def row(name: str, rate: float, context: int, **more: Any) -> dict[str, Any]:
        values = {"name": name, "context": context, "batch": 1, "prompt": False, "tokens_per_second": rate}
        return values | {"slowest": rate, "fastest": rate, "cores_used_by_others": 0.0} | more

    contexts = (0, 2048, 16384)
    rows = [row("openxlstm int8", 300.0, c, share_of_bound=0.8, probe=4e10) for c in contexts]
    rows += [row("llama.cpp q8_0", 200.0, c, cores_used_by_others=0.5) for c in contexts]
    positions = {"tokens_per_second": {"1,000": 100.0, "100,000": 101.0}}
    positions["resident_bytes"] = {"1,000": 1e6, "100,000": 1e6}
    parts = {"decode-int8": facts | {"rows": rows}, "positions": facts | positions}
    return {"name": "cpu-xlstm-160m", "size": "xlstm-160m", "parts": parts}


def test_tables_and_plot(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table: ModuleType = load("table")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "PLOT", tmp_path / "plot.svg")
    (tmp_path / "2026-01-01-cpu.json").write_text(json.dumps(_report()))
    table.main()
    text = (tmp_path / "README.md").read_text()
    assert "| **openxlstm int8** | 2,048 | 1 | 300 | 300, 300 |  |  | 80% | 40 GB/s |" in text
    busy = "| llama.cpp q8_0 (busy machine: others used 0.5 cores) | 0 | 1 | 200 | 200, 200 | 1.50x | 1.9x |"
    assert busy in text
    assert "100 after 1,000, 101 after 100,000 tokens; 1.0% between" in text
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
