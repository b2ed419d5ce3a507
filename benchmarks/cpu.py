"""Decoding on a CPU: the native engine by type of weights and batch, against what memory allows.

    python benchmarks/cpu.py                                # the table; a few minutes on two cores
    python benchmarks/cpu.py --size xlstm-400m --seconds 4

Each step stands beside a read of memory with the same threads, because a shared machine changes its bandwidth
from second to second; "share" is the median over such pairs. Bytes of a step are the weights once and the
states twice, read and written. A state has no length, so the rows need no context; a small model that really
reads a million tokens shows that its speed does not change. Other runtimes are not measured here yet.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from harness import RESULTS, environment, parser
from openxlstm.cli.bench import random_model
from openxlstm.inference.engine import DecodeEngine
from openxlstm.inference.measurement import cpu_seconds, state_bytes, weight_bytes
from openxlstm.models import build_model
from openxlstm.ops.products import read_memory

PROBE = 128 << 20


class Row:
    """One thing to time: a call that advances all its sequences by one token."""

    def __init__(self, name: str, step: Callable[[], Any], batch: int, traffic: int) -> None:
        self.name, self.step, self.batch, self.traffic = name, step, batch, traffic
        self.times: list[float] = []
        self.rates: list[float] = []

    def result(self) -> dict[str, Any]:
        pairs = zip(self.times, self.rates, strict=True)
        return {
            "tokens_per_second": self.batch / statistics.median(self.times),
            "best_tokens_per_second": self.batch / min(self.times),
            "share_of_bound": statistics.median(self.traffic / t / r for t, r in pairs),
            "bandwidth": statistics.median(self.rates),
            "bytes_per_step": self.traffic,
            "steps": len(self.times),
        }


def ours(size: str, dtype: str, batches: tuple[int, ...]) -> list[Row]:
    """Rows of one model for several batch sizes."""
    model = random_model(size, dtype, sum(batches))
    engine = DecodeEngine(model)
    return [_row(model, engine, dtype, batch) for batch in batches]


def _row(model: Any, engine: DecodeEngine, dtype: str, batch: int) -> Row:
    held = engine.open(rows=batch)
    traffic = weight_bytes(model) + 2 * state_bytes(held)
    tokens = [5] * batch
    return Row(
        f"openxlstm {dtype}, batch {batch}",
        lambda: engine.step(tokens, held, reuse=True),
        batch,
        traffic,
    )


def measure(rows: list[Row], seconds: float) -> tuple[dict[str, Any], float | None]:
    """Let the rows take turns; also the cores that other programs used meanwhile."""
    probe = torch.ones(PROBE // 4)
    for row in rows:
        row.step()
    begin, before = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds * len(rows) or len(rows[0].times) < 5:
        for row in rows:
            start = time.perf_counter()
            read_memory(probe)
            middle = time.perf_counter()
            row.step()
            end = time.perf_counter()
            row.rates.append(PROBE / (middle - start))
            row.times.append(end - middle)
    elapsed, after = time.perf_counter() - begin, cpu_seconds()
    others = None
    if before is not None and after is not None:
        others = max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / elapsed
    return {row.name: row.result() for row in rows}, others


def long_context(tokens: int) -> dict[str, Any]:
    """Tokens per second of a small model around its 1,000th, 100,000th and last token, all really read."""
    config = {"model_type": "xlstm_large", "embedding_dim": 64, "num_heads": 2, "num_blocks": 1}
    model = build_model(config | {"vocab_size": 64})
    engine = DecodeEngine(model)
    held = engine.open()
    marks = [mark for mark in (1_000, 10_000, 100_000, 1_000_000) if mark <= tokens]
    rates, window = {}, 500
    recent: list[float] = []
    for position in range(1, tokens + 1):
        start = time.perf_counter()
        engine.step([position % 64], held, reuse=True)
        recent.append(time.perf_counter() - start)
        if position in marks:
            rates[f"{position:,}"] = 1 / statistics.median(recent[-window:])
        if len(recent) > 2 * window:
            del recent[:window]
    return rates


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", choices=("xlstm-160m", "xlstm-400m"), default="xlstm-160m")
    p.add_argument("--seconds", type=float, default=3.0, help="per row")
    p.add_argument("--tokens", type=int, default=1_000_000, help="that the small model reads")
    p.add_argument("--dtypes", nargs="+", default=["bf16", "int8", "int4", "float32"])
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"name": f"decode-{arguments.size}", **environment(arguments), "groups": {}}
    report["decode"], busy = {}, []
    for dtype in arguments.dtypes:
        rows, others = measure(ours(arguments.size, dtype, (1, 8)), arguments.seconds)
        report["decode"] |= rows
        busy.append(others or 0.0)
    if arguments.tokens:
        report["small_model_by_position"] = long_context(arguments.tokens)
    report["cores_used_by_others"] = max(busy)
    report["disturbed"] = max(busy) > 0.1
    _print(report)
    today = datetime.date.today().isoformat()
    output = arguments.output or RESULTS / f"{today}-{report['name']}.json"
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {output}")


def _print(report: dict[str, Any]) -> None:
    print(f"{'':42s} {'tokens/s':>9s} {'of the bound':>13s} {'memory':>10s}")
    for name, row in report["decode"].items():
        rate, share = f"{row['tokens_per_second']:.1f}", f"{row['share_of_bound']:.0%}"
        print(f"{name:42s} {rate:>9s} {share:>13s} {row['bandwidth'] / 1e9:6.1f} GB/s")
    for position, rate in report.get("small_model_by_position", {}).items():
        print(f"small model, around token {position:>9s}: {rate:9,.0f} tokens/s")
    if report["disturbed"]:
        print(f"note: the machine is busy: others used {report['cores_used_by_others']:.1f} cores meanwhile")


if __name__ == "__main__":
    main()
