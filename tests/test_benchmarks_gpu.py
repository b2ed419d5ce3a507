"""The script for GPUs, without one: what it survives, what it writes, and a rehearsal of all of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
JOB = """
import json, os, sys, time
job = json.loads(sys.argv[1])
for peer in ("ours", "crashes", "hangs", "last"):
    if peer in job["skip"]:
        continue
    print(json.dumps({"trying": peer}), flush=True)
    if peer == "crashes":
        sys.exit("CUDA error: an illegal memory access was encountered")
    if peer == "hangs":
        time.sleep(60)
for peer in ("ours", "last"):
    print(json.dumps({"row": {"what": peer, "ms": 1.0}}))
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py as a module."""
    if not BENCHMARKS.is_dir():
        pytest.skip("no benchmarks/ beside the tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_a_peer_that_crashes_or_hangs_costs_its_own_row(gpu, tmp_path, monkeypatch):
    """The others are measured, the reasons are one line each, and the file is whole after every job."""
    (tmp_path / "gpu_jobs.py").write_text(JOB)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    run = gpu.Run(tmp_path / "out" / "report.json", 1.0, {"date": "today"}, job_seconds=2.0)
    rows = run.job("mlstm", {"kind": "any"})
    assert [row["what"] for row in rows] == ["ours", "last"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mlstm"] == rows
    reasons = {row["what"]: row["failed"] for row in report["failures"]}
    assert reasons["crashes"] == "exit status 1: CUDA error: an illegal memory access was encountered"
    assert reasons["hangs"] == "over 2 seconds"
    assert os.listdir(tmp_path / "out") == ["report.json"]


def test_no_time_left_is_said(gpu, tmp_path):
    run = gpu.Run(tmp_path / "report.json", 0.0, {})
    assert run.job("rnn", {"kind": "any"}) == [{"job": {"kind": "any"}, "left out": "no time left"}]
    gpu.show(run.report["rnn"])


def test_every_section_has_jobs_that_exist(gpu):
    for sizes in (gpu.gpu_jobs.Sizes.full(quick=False), gpu.gpu_jobs.Sizes.toy()):
        jobs = gpu.gpu_jobs.checks(sizes)
        for section in gpu.SECTIONS[1:]:
            jobs += gpu.gpu_jobs.timings(section, sizes, {})
        assert {job["kind"] for job in jobs} | {"machine"} == set(gpu.gpu_jobs.KINDS)
        json.dumps(jobs)


def test_the_most_important_of_every_section_comes_first(gpu):
    jobs = gpu.in_turn(["mlstm", "rnn"], gpu.gpu_jobs.Sizes.full(quick=False), {})
    assert [job["section"] for job in jobs[:5]] == ["mlstm", "rnn", "mlstm", "rnn", "mlstm"]
    assert jobs[0]["shape"][:2] == [8, 8192]
    assert len(jobs) == 9 + 7


def test_wrong_results_and_slow_checks_do_not_cost_the_timings(gpu, tmp_path, monkeypatch, capsys):
    """They are named, and later jobs have been run once beside them, without leaving rows."""
    (tmp_path / "gpu_jobs.py").write_text(
        "import json, sys\njob = json.loads(sys.argv[1])\n"
        "row = {'what': job['kind'], 'values': 1.0, 'good': job['kind'] == 'fine'}\n"
        "open(f'{sys.path[0]}/ran', 'a').write(f\"{job['kind']} {job.get('repeats')};\")\n"
        "print(json.dumps({'row': row}))\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    run = gpu.Run(tmp_path / "report.json", 1.0, {})
    later = [{"kind": "timed", "repeats": 15}]
    assert not gpu.side_by_side(run, [{"kind": "fine"}, {"kind": "bad"}], later)
    assert "correctness: 1 of 2 within tolerance" in capsys.readouterr().out
    assert set((tmp_path / "ran").read_text().split(";")) == {"fine None", "bad None", "timed 0", ""}
    assert list(run.report) == ["correctness"]
    run.reserved = 100.0
    assert run.job("correctness", {"kind": "fine"})[0]["left out"] == "no time left"


def test_the_end_says_what_is_missed_and_what_to_tune(gpu, capsys):
    shape, what = next(iter(gpu.TARGETS))
    tiles = [
        {"shape": "s", "field": "output", "what": f"output: {name}", "ms": ms}
        for name, ms in (("shipped", 2.0), ("k=32", 1.5), ("v=64", 1.9))
    ]
    gpu.conclude({"mlstm": [{"shape": shape, "what": what, "ms": 1.25}], "tiles": tiles})
    said = capsys.readouterr().out
    assert "1.250 ms  target 1.0 ms: MISSED" in said
    assert said.count("not measured") == len(gpu.TARGETS) - 1
    assert "tune output: k=32 takes 1.500 ms, shipped 2.000 ms" in said


def test_the_end_compares_with_bounds_and_peers(gpu, capsys):
    long, short = "mlstm B=1 T=4096 H=8 DK=256 DV=512", "mlstm B=1 T=512 H=8 DK=256 DV=512"
    times = {"ours exp": 1.0, "mlstm_kernels a": 5.0, "mlstm_kernels b": 3.0, "sdpa causal": 1.5}
    rows = [
        {"shape": shape, "what": f"{name} | forward", "ms": ms}
        for shape in (long, short)
        for name, ms in times.items()
    ]
    steps = [
        {"shape": "step B=16 H=8 DK=256 DV=512", "what": name, "ms": ms, "bound_ms": 0.9}
        for name, ms in (("ours | eager", 2.0), ("ours graphed | CUDA graph", 1.0))
    ]
    recurrent = [
        {"shape": "lstm B=16 T=1024 12 heads of 64", "what": f"{name} | forward", "ms": ms}
        for name, ms in (("ours", 1.5), ("cuDNN LSTM, dense, hidden 768, with its input product", 1.2))
    ]
    gpu.conclude({"mlstm": rows, "decode": steps, "rnn": recurrent})
    said = " ".join(capsys.readouterr().out.split())
    assert f"{long} forward against mlstm_kernels 3.00x target 4.00x: MISSED" in said
    assert f"{long} forward against sdpa causal 1.50x target 1.00x: met" in said
    assert f"{short} forward against sdpa" not in said
    assert "step B=16 H=8 DK=256 DV=512 of the bound 90% target 80%: met" in said
    assert "12 heads of 64 forward against cuDNN LSTM 0.80x target 0.77x: met" in said


def test_a_variant_that_cannot_run_is_a_line(gpu, capsys):
    def broken() -> Any:
        raise ImportError("no such kernel\nand more")

    calls = gpu.gpu_jobs.prepared({"ours": lambda: {"a": int}, "peer": broken}, {"skip": []})
    assert list(calls) == ["ours | a"]
    assert "ImportError: no such kernel" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_script_says_so(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs a CUDA or ROCm device; this machine has none"):
        gpu.main()


@pytest.mark.slow
def test_rehearsal(gpu, triton_device, tmp_path):
    """Every section at toy sizes in the interpreter: the first run on a GPU must not meet a typing error."""
    output = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--minutes", "30"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert "failures" not in report
    for section in ("mlstm", "decode", "rnn", "model"):
        assert all("ms" in row for row in report[section] if "ours" in row["what"]), report[section]
    assert all(row["good"] for row in report["correctness"])
