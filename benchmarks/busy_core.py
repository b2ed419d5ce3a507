"""How much decoding slows down while another program holds a core.

    python benchmarks/busy_core.py          # int8 steps of the 160M model; about ten seconds

Steps alone and steps beside a process that spins on core 0 take turns. A step that waits for its turn counts:
the figure is the mean over a turn, medians over turns. Threads that spin while they wait lose ten times here.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from harness import RESULTS, environment, parser
from openxlstm.cli.bench import random_model
from openxlstm.inference.engine import DecodeEngine
from openxlstm.runtime import atomic_write_bytes

SPIN = "import os; os.sched_setaffinity(0, {0})\nwhile True: pass"
STEPS = 100


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds per step, alone and beside the other process."""
    engine = DecodeEngine(random_model("xlstm-160m", dtype))
    held = engine.open()

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step([5], held, reuse=True)
        return (time.perf_counter() - start) / STEPS

    turn()
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(turn())
        other = subprocess.Popen([sys.executable, "-c", SPIN])
        try:
            time.sleep(0.2)  # until it runs
            beside.append(turn())
        finally:
            other.kill()
            other.wait()
    rates = {"alone": 1 / statistics.median(alone), "beside": 1 / statistics.median(beside)}
    return {"tokens_per_second": rates, "slowdown": rates["alone"] / rates["beside"]}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtypes", nargs="+", default=["bf16", "int8", "int4"])
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"name": "busy-core", **environment(arguments), "dtypes": {}}
    for dtype in arguments.dtypes:
        found = report["dtypes"][dtype] = measure(dtype, arguments.repeats)
        rates = found["tokens_per_second"]
        print(
            f"{dtype}: {rates['alone']:.0f} tokens/s alone, {rates['beside']:.0f} beside a process that "
            f"holds a core: {found['slowdown']:.2f}x slower"
        )
    output = arguments.output or RESULTS / f"{datetime.date.today().isoformat()}-busy-core.json"
    atomic_write_bytes(output, (json.dumps(report, indent=1) + "\n").encode())
    print(f"written: {output}")


if __name__ == "__main__":
    main()
