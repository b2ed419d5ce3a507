"""Language models on a CPU beside other runtimes: decoding by type, context and batch, prompts, long texts.

    python benchmarks/cpu.py                                  # all of it: half an hour on two cores
    python benchmarks/cpu.py --parts decode-int8 prompt-2048  # these replace those of an earlier run
    python benchmarks/cpu.py --size xlstm-400m --parts decode-bfloat16 decode-int8 decode-int4

All models have the same number of parameters, random weights and the same threads. Other runtimes stand
beside ours where they are installed (see results/README.md); the rest is skipped with a line that says how to
get it. How rows take turns and what bounds them is told in turns.py, what each runtime does in runtimes/.
Bytes of a step are the weights once, a recurrent state twice, a cache of keys and values once. The part
`operators` runs mlstm_cpu.py and slstm_cpu.py, which write files of their own. Then table.py makes tables of
all files, and the plot.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS, OtherLoad, disturbance, environment, parser, warn
from openxlstm.runtime import atomic_write_bytes
from turns import NAMES, Row, measure

CONTEXTS = (0, 2048, 8192, 16384)
TYPES = {"bfloat16": "f16", "int8": "q8_0", "int4": "q4_0", "float32": "f32"}
"""Our types of weights, and llama.cpp's with as many bits."""
PYTORCH = ("transformers_llama", "transformers_xlstm", "xlstm")
"""Peers that have no quantised weights."""
BATCH = 8


def rows(part: str) -> list[Row]:
    """The rows of a part of the table."""
    kind, _, what = part.partition("-")
    if kind == "decode":
        contexts = CONTEXTS if what != "float32" else (0,)
        found = [Row(r, d, c) for r, d in (("openxlstm", what), ("llama_cpp", TYPES[what])) for c in contexts]
        if what in ("bfloat16", "float32"):
            found += [Row("transformers_llama", what, c) for c in contexts]
            found += [Row(runtime, what) for runtime in PYTORCH[1:]]
        return found
    if kind == "batch":
        found = [Row("openxlstm", d, batch=b) for d in TYPES for b in (1, BATCH)]
        found += [Row("llama_cpp", TYPES[d], batch=BATCH) for d in ("bfloat16", "int8", "int4")]
        return found + [Row(r, "float32", batch=BATCH) for r in PYTORCH[1:]]
    length = int(what)
    found = [Row("openxlstm", d, length, prompt=True) for d in ("bfloat16", "int8")]
    found += [Row("llama_cpp", d, length, prompt=True) for d in ("f16", "bf16", "q8_0", "q4_0")]
    found += [Row(r, "bfloat16", length, prompt=True) for r in PYTORCH]
    if length <= 2048:
        found += [Row(r, "float32", length, prompt=True) for r in ("openxlstm", *PYTORCH)]
    return found


TABLES = (*(f"decode-{dtype}" for dtype in TYPES), "batch", "prompt-2048", "prompt-8192")
PARTS = (*TABLES, "positions", "xlstm-7b", "operators")


def table(part: str, arguments: Any) -> dict[str, Any]:
    """Measure the rows of a part: name, facts and figures of each."""
    chosen = [row for row in rows(part) if row.runtime in arguments.runtimes]
    result = measure(chosen, size=arguments.size, threads=arguments.threads, seconds=arguments.seconds)
    lines = [
        {"name": row.name, "context": row.context, "batch": row.batch, "prompt": row.prompt, **values}
        for row, values in result.items()
    ]
    return {"rows": lines, **disturbance(max((x["cores_used_by_others"] for x in lines), default=None))}


def positions(tokens: int) -> dict[str, Any]:
    """Speed of a small model after 1,000 to ``tokens`` tokens, all really read; the positions take turns."""
    from openxlstm.inference.engine import DecodeEngine
    from openxlstm.models import build_model

    config = {"model_type": "xlstm_large", "embedding_dim": 64, "num_heads": 2, "num_blocks": 1}
    engine = DecodeEngine(build_model(config | {"vocab_size": 64}))
    held, kept, resident = engine.open(), {}, {}
    marks = [mark for mark in (1_000, 10_000, 100_000, 1_000_000) if mark <= tokens]
    for position in range(1, tokens + 1):
        engine.step([position % 64], held, reuse=True)
        if position in marks:
            kept[position] = engine.open(held.state())
            resident[position] = _resident_bytes()
    times: dict[int, list[float]] = {mark: [] for mark in marks}
    load = OtherLoad()
    for _ in range(400):
        for mark, state in kept.items():
            start = time.perf_counter()
            for _ in range(25):
                engine.step([5], state, reuse=True)
            times[mark].append((time.perf_counter() - start) / 25)
    rates = {f"{mark:,}": 1 / statistics.median(seconds) for mark, seconds in times.items()}
    memory = {f"{mark:,}": size for mark, size in resident.items()}
    return {"tokens_per_second": rates, "resident_bytes": memory, **disturbance(load.cores())}


def _resident_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def large_model(threads: int, seconds: float) -> dict[str, Any]:
    """`openxlstm bench` of the 7B size in int4, in a process of its own, with that process's peak memory."""
    words = ["--model", "xlstm-7b", "--random-weights", "--dtype", "int4", "--json"]
    words += ["--threads", str(threads), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "openxlstm.cli", "bench", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"`openxlstm bench` of the 7B size failed with status {os.waitstatus_to_exitcode(status)}"
        )
    result = json.loads(printed) | {"peak_bytes": usage.ru_maxrss * 1024}
    return result | disturbance(result["cores_used_by_others"])


def operators() -> dict[str, Any]:
    """Run the operators' benchmarks, which write files of their own."""
    folder, failed = Path(__file__).parent, []
    commands = [["mlstm_cpu.py", "--dtype", dtype] for dtype in ("bfloat16", "float32")]
    commands += [[*c, "--allocator", "large-threshold", "--no-memory"] for c in commands]
    commands += [["slstm_cpu.py"], ["slstm_cpu.py", "--cell", "lstm"]]
    commands += [[*c, "--shape", "large", "--no-memory"] for c in commands[-2:]]
    for script, *options in commands:
        command = [sys.executable, str(folder / script), "--repeats", "5", *options]
        if subprocess.run(command, check=False).returncode:
            failed.append(" ".join([script, *options]))
    return {"failed": failed, **disturbance(None)}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", choices=("xlstm-160m", "xlstm-400m"), default="xlstm-160m")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--runtimes", nargs="+", choices=list(NAMES), default=list(NAMES))
    p.add_argument("--seconds", type=float, default=2.0, help="of turns per row")
    p.add_argument("--tokens", type=int, default=1_000_000, help="that the small model reads")
    arguments = p.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    today = datetime.date.today().isoformat()
    output = arguments.output or RESULTS / f"{today}-cpu-{arguments.size}.json"
    report: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    report |= {"name": f"cpu-{arguments.size}", "size": arguments.size}
    for part in arguments.parts:
        print(f"\n{part}", flush=True)
        if part == "positions":
            result = positions(arguments.tokens)
        elif part == "xlstm-7b":
            result = large_model(arguments.threads, arguments.seconds)
        elif part == "operators":
            result = operators()
        else:
            result = table(part, arguments)
        _print(result)
        warn(part, result)
        report["parts"][part] = {**environment(arguments), **result}
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(output, (json.dumps(report, indent=1) + "\n").encode())
    print(f"\nwritten: {output}")


def _print(result: dict[str, Any]) -> None:
    for row in result.get("rows", ()):
        where = f"prompt of {row['context']:,}" if row["prompt"] else f"after {row['context']:,}"
        if row["batch"] > 1:
            where += f", batch {row['batch']}"
        share = f"{row['share_of_bound']:6.0%}" if "share_of_bound" in row else " " * 6
        probe = f"{row['probe'] / 1e9:5.0f}" if "probe" in row else ""
        unit = ("GFLOP/s" if row["prompt"] else "GB/s") if probe else ""
        bound = f"{share} of {probe} {unit}" if probe else ""
        print(f"  {row['name']:28s} {where:22s} {row['tokens_per_second']:9.1f} tokens/s {bound}")
    if isinstance(result.get("tokens_per_second"), dict):
        for position, rate in result["tokens_per_second"].items():
            memory = (result["resident_bytes"][position] or 0) / 1e6
            print(
                f"  small model after {position:>9s} tokens: {rate:9,.0f} tokens/s, {memory:.0f} MB resident"
            )
    elif "share_of_bound" in result:
        print(f"  {result['tokens_per_second']:.1f} tokens/s, {result['share_of_bound']:.0%} of the bound")


if __name__ == "__main__":
    main()
