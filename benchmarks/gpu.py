"""GPU kernels: first right, then fast. One run of at most eight minutes prints a table and writes JSON.

    python benchmarks/gpu.py                     everything
    python benchmarks/gpu.py --only correctness  the case table against float64, nothing timed
    python benchmarks/gpu.py --rehearse          the whole script at toy sizes in Triton's interpreter, no GPU

Correctness compares every kernel with float64 on the same rounded inputs, values and gradients, over the
case table of the tests, in processes side by side that also compile what is timed later; it takes half the
time at most. What is wrong is named, and the exit status is 1. Then every section's most important shape is
timed, then every section's second, so that what the time does not allow is the least important of each. The
end compares with the targets, shows the time of each kernel, and names other tiles that are faster than the
shipped ones (openxlstm/ops/gpu/configurations.py). Timings interleave ours with the peers
that are installed (mlstm_kernels, flash-linear-attention, SDPA, a cuDNN LSTM), flush the L2 cache before each
call and report medians, with the bound of the machine (matrix rate and bandwidth measured in the same run)
beside each figure.

Every job (a case, a shape) is a process of its own with a time limit (:mod:`gpu_jobs`), so that a kernel that
hangs, or breaks its CUDA context, costs one row: the job runs again without the peer that failed, and the row
says why in one line. The JSON is rewritten after every job. What the time did not allow is named.

Needs a CUDA or ROCm device. Results go to benchmarks/results/gpu/.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import gpu_jobs

HERE = Path(__file__).parent
SECTIONS = ("correctness", "mlstm", "decode", "rnn", "model", "tiles")
JOB_SECONDS = 120.0
"""Limit of one job; less where less of the budget is left."""
TARGETS = {
    ("mlstm B=8 T=8192 H=8 DK=256 DV=512", "ours exp | forward"): 1.0,
    ("mlstm B=8 T=8192 H=8 DK=256 DV=512", "ours exp | forward+backward"): 3.5,
    ("mlstm B=1 T=65536 H=8 DK=256 DV=512", "ours exp | forward"): 1.6,
    ("mlstm B=1 T=65536 H=8 DK=256 DV=512", "ours exp | forward+backward"): 5.0,
    ("lstm B=16 T=1024 12 heads of 64", "ours | forward"): 1.23,
    ("lstm B=16 T=1024 6 heads of 128", "ours | forward"): 1.23,
}
"""Milliseconds on an H200."""
SHARES = {
    "step B=16": (("ours | eager", "ours graphed | CUDA graph"), 0.8),
    "step B=64": (("ours | eager", "ours graphed | CUDA graph"), 0.8),
    "decode E=4096": (("ours | one token",), 0.75),
    "block E=": (("ours eager | forward+backward", "ours compiled | compiled, forward+backward"), 0.45),
}
"""Beginning of a shape: the rows of which the faster one counts, and its least share of the bound."""
PEERS = {"mlstm_kernels": 4.0, "fla simple_gla": 2.0, "sdpa causal": 1.0, "cuDNN LSTM": 1 / 1.3}
"""Beginning of a peer's name: how many times as fast ours must at least be (SDPA from 4,096 positions on)."""


class Run:
    """The time budget, and the report, which is on disk after every change."""

    def __init__(
        self, output: Path, minutes: float, report: dict[str, Any], job_seconds: float = JOB_SECONDS
    ) -> None:
        self._job_seconds = job_seconds
        self._end = time.monotonic() + 60 * minutes
        self._output, self._lock = output, threading.Lock()
        self.report = report

        self.reserved = 0.0
        """Seconds kept for what comes later."""

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic() - self.reserved

    def add(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a section and write the file, in one rename."""
        with self._lock:
            self.report.setdefault(section, []).extend(rows)
            self._output.parent.mkdir(parents=True, exist_ok=True)
            beside = self._output.with_name(f".{self._output.name}.tmp")
            beside.write_text(json.dumps(self.report, indent=1) + "\n")
            os.replace(beside, self._output)

    def job(self, section: str, job: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a job, again without whatever breaks it, and add its rows."""
        skip: list[str] = []
        while True:
            if self.left() < 5:
                rows = [{"job": job, "left out": "no time left"}]
                break
            rows, guilty = self.once({**job, "skip": skip})
            if guilty is None or guilty in skip:
                break
            self.add("failures", [row for row in rows if "failed" in row])
            skip.append(guilty)
        self.add(section, rows)
        return rows

    def once(self, job: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
        """Rows of one process, and the variant that ended it early, if one did."""
        limit = min(self._job_seconds, self.left())
        command = [sys.executable, str(HERE / "gpu_jobs.py"), json.dumps(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            output, words, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            parts = [x.decode() if isinstance(x, bytes) else x or "" for x in (error.stdout, error.stderr)]
            output, words, code = parts[0], parts[1], None
        rows, trying = [], None
        for line in output.splitlines():
            event = json.loads(line)
            trying = event.get("trying", trying)
            if "row" in event:
                rows.append(event["row"])
        if code == 0:
            return rows, None
        last = (words.strip().splitlines() or [""])[-1][:200]
        reason = f"over {limit:.0f} seconds" if code is None else f"exit status {code}: {last}"
        broken = {k: v for k, v in job.items() if k != "skip"}
        rows.append({"job": broken, "what": trying, "failed": reason})
        return rows, trying


def side_by_side(run: Run, checks: list[dict[str, Any]], later: list[dict[str, Any]]) -> bool:
    """Check every case, and run once what is timed later: most of the time goes into compiling, and compilers
    keep their results on disk. Returns whether all is right."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: run.job("correctness", job), checks)
        warm = pool.map(lambda job: run.left() > 5 and run.once({**job, "repeats": 0, "skip": []}), later)
        rows = [row for result in results for row in result]
        list(warm)
    if not checks:
        return True
    bad = [row for row in rows if not row.get("good")]
    print(f"correctness: {len(rows) - len(bad)} of {len(rows)} within tolerance")
    for row in bad:
        print("  WRONG" if "values" in row else "  NOT CHECKED", json.dumps(row))
    return not any("values" in row or "failed" in row for row in bad)


def show(rows: list[dict[str, Any]]) -> None:
    """A few lines per shape."""
    shape = None
    for row in rows:
        if "ms" not in row:
            why = row.get("failed") or row.get("left out")
            print(f"  {row.get('what') or json.dumps(row['job'])}: {why}")
            continue
        if row["shape"] != shape:
            shape = row["shape"]
            print(f"\n{shape}")
        parts = [f"  {row['what']:56s} {row['ms']:9.3f} ms"]
        if "bound_ms" in row:
            parts.append(f"bound {row['bound_ms']:8.3f} ms ({row['bound_ms'] / row['ms']:4.0%})")
        if "us_per_step" in row:
            parts.append(f"{row['us_per_step']:.2f} us per step")
        if row.get("peak_bytes"):
            parts.append(f"{row['peak_bytes'] / 1e9:6.2f} GB")
        print("   ".join(parts))


def in_turn(sections: list[str], sizes: gpu_jobs.Sizes, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs of all sections, the first of each before the second of any."""
    lists = [
        [{**job, "section": section} for job in gpu_jobs.timings(section, sizes, rates)]
        for section in sections
    ]
    return [job for turn in itertools.zip_longest(*lists) for job in turn if job is not None]


def _conclude_shares(shape: str, rows: dict[str, dict[str, Any]]) -> None:
    for beginning, (names, target) in SHARES.items():
        mine = [rows[name] for name in names if name in rows]
        if shape.startswith(beginning) and mine:
            share = max(row["bound_ms"] / row["ms"] for row in mine)
            _verdict(shape, "of the bound", f"{share:.0%}", f"{target:.0%}", share >= target)


def _conclude_peers(shape: str, rows: dict[str, dict[str, Any]]) -> None:
    """Ours, with the exponential gate, against the fastest row of each peer."""
    for peer, target in PEERS.items():
        for what in ("forward", "forward+backward"):
            mine = next((rows[n] for n in (f"ours exp | {what}", f"ours | {what}") if n in rows), None)
            theirs = [row["ms"] for n, row in rows.items() if n.startswith(peer) and n.endswith(f"| {what}")]
            if mine is None or not theirs or (peer == "sdpa causal" and _positions(shape) < 4096):
                continue
            times = min(theirs) / mine["ms"]
            _verdict(shape, f"{what} against {peer}", f"{times:.2f}x", f"{target:.2f}x", times >= target)


def _positions(shape: str) -> int:
    """T of "mlstm B=8 T=8192 ..."."""
    return int(next(part for part in shape.split() if part.startswith("T="))[2:])


def _verdict(shape: str, what: str, found: str, target: str, met: bool | None) -> None:
    """One line; ``met`` is None for what was not measured."""
    verdict = "not measured" if met is None else "met" if met else "MISSED"
    print(f"  {shape:40s} {what:30s} {found:>11s}  target {target}: {verdict}")


def conclude(report: dict[str, Any]) -> None:
    """Targets, and the fastest tiles."""
    rows = [row for section in SECTIONS[1:] for row in report.get(section, []) if "ms" in row]
    print("\ntargets (H200)")
    for (shape, what), target in TARGETS.items():
        ms = next((row["ms"] for row in rows if (row["shape"], row["what"]) == (shape, what)), None)
        found, met = ("", None) if ms is None else (f"{ms:.3f} ms", ms <= target)
        _verdict(shape, what, found, f"{target} ms", met)
    by_shape: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], {})[row["what"]] = row
    for shape, found in by_shape.items():
        _conclude_shares(shape, found)
        _conclude_peers(shape, found)
    tiles = [row for row in rows if "field" in row]
    for shape, field in dict.fromkeys((row["shape"], row["field"]) for row in tiles):
        tried = [row for row in tiles if (row["shape"], row["field"]) == (shape, field)]
        best, shipped = min(tried, key=lambda row: row["ms"]), tried[0]
        if best["ms"] < 0.98 * shipped["ms"]:
            print(f"  tune {best['what']} takes {best['ms']:.3f} ms, shipped {shipped['ms']:.3f} ms")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=SECTIONS)
    p.add_argument("--quick", action="store_true", help="one shape per section, three repeats")
    p.add_argument(
        "--rehearse", action="store_true", help="toy sizes on the CPU: tests this script, no speeds"
    )
    p.add_argument("--minutes", type=float, default=8.0, help="time budget")
    p.add_argument("--output", type=Path, help="JSON file (default: results/gpu/DATE-DEVICE.json)")
    a = p.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # what is known shows even if the run is cut off
    if a.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a CUDA or ROCm device; this machine has none. "
            "--rehearse runs it at toy sizes in Triton's interpreter."
        )
    name = "rehearsal" if a.rehearse else torch.cuda.get_device_name()
    distributions = {"fla": "flash-linear-attention"}
    versions = {
        distributions.get(module, module): importlib.metadata.version(distributions.get(module, module))
        for module in ("openxlstm", "torch", "triton", "mlstm_kernels", "fla")
        if importlib.util.find_spec(module)
    }
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": name, "versions": versions,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }  # fmt: skip
    if a.rehearse:
        report["note"] = "a rehearsal on a CPU: nothing here is the speed of anything"
    output = a.output or HERE / "results" / "gpu" / f"{report['date']}-{name.replace(' ', '-')}.json"
    sizes = gpu_jobs.Sizes.toy() if a.rehearse else gpu_jobs.Sizes.full(quick=a.quick)
    run = Run(output, a.minutes, report, job_seconds=60 * a.minutes if a.rehearse else JOB_SECONDS)
    checks = gpu_jobs.checks(sizes) if a.only in (None, "correctness") else []
    sections = [s for s in SECTIONS[1:] if a.only in (None, s)]
    run.reserved = 30 * a.minutes if sections else 0.0
    right = side_by_side(run, checks, in_turn(sections, sizes, {"matrix": 1.0, "bandwidth": 1.0}))
    run.reserved = 0.0
    if sections:
        rates = run.job("machine", {"kind": "machine", "toy": a.rehearse})[0]
        if "matrix" not in rates:
            sys.exit(f"the machine's own rates could not be measured: {rates}. Written: {output}")
        print(f"{name}: {rates['matrix'] / 1e12:.3g} TFLOP/s bfloat16, {rates['bandwidth'] / 1e12:.3g} TB/s")
        for job in in_turn(sections, sizes, rates):
            show(run.job(job["section"], job))
        conclude(run.report)
    print(f"\nwritten: {output}")
    if not right:
        sys.exit("some results are WRONG, see above: the speed of such a kernel means nothing")


if __name__ == "__main__":
    main()
