"""How benchmarks here measure: variants interleaved in one run, medians, memory in a process of its own.

A benchmark is a list of :class:`Variant`. Rounds run every variant once, in turn, so that a noisy machine
disturbs all alike; the figure is the ratio of medians. Peak memory comes from a fresh process per variant:
resident high-water mark during the second call, minus what was resident before it (inputs and libraries; the
first call loads code that stays). The matrix rate of the machine is measured in the same run, as the bound
beside the figure, and what other programs take of the processors meanwhile: if that is much, a note says so.
So is what the operating system takes of each call, and how fast it hands out fresh memory: where that is slow
(a virtual machine that gives free memory back to its host), it bounds whatever allocates its results.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openxlstm
from openxlstm.inference.measurement import BUSY, OtherLoad
from openxlstm.ops.matmul import matmul
from openxlstm.ops.native import loader
from openxlstm.runtime import cpu_info

RESULTS = Path(__file__).parent / "results"
LARGE_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


@dataclass
class Variant:
    """One thing to time: ``prepare`` builds inputs and returns the call to measure."""

    name: str
    prepare: Callable[[], Callable[[], Any]]
    flops: float | None = None
    """Floating-point operations of one call, to show the rate reached."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=7, help="timed rounds after one warm-up round")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch threads")
    p.add_argument(
        "--allocator",
        choices=("default", "large-threshold"),
        default="default",
        help="glibc defaults, or a large mmap threshold (freed blocks are kept instead of returned)",
    )
    p.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    p.add_argument("--output", type=Path, default=None, help="JSON file (default: results/DATE-NAME.json)")
    p.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    return p


def with_allocator(arguments: argparse.Namespace) -> None:
    """Restart the process under the requested allocator settings, which glibc reads at start only."""
    wanted = LARGE_THRESHOLD if arguments.allocator == "large-threshold" else {}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def matrix_rate(dtype: torch.dtype = torch.float32, *sizes: int, repeats: int = 6) -> float:
    """FLOP/s of square products, PyTorch's or ours, the best of all repeats and sizes (1024 unless given)."""
    best = 0.0
    for size in sizes or (1024,):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for product in (torch.matmul, matmul):
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                product(a, b)
                times.append(time.perf_counter() - start)
            best = max(best, 2 * size**3 / min(times[1:]))
    return best


def fresh_memory_rate(size: int = 1 << 26) -> float:
    """Bytes/s at which memory fresh from the system, in huge pages, is written for the first time."""
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(pages, dtype=torch.uint8)
    start = time.perf_counter()
    block.zero_()
    return size / (time.perf_counter() - start)


def run(
    name: str,
    groups: dict[str, list[Variant]],
    arguments: argparse.Namespace,
    *,
    peer: str,
    ours: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Time every group of variants, print a table, write the JSON.

    Args:
        name: of the benchmark.
        groups: group label to its variants; ratios are taken within a group.
        arguments: from :func:`parser`.
        peer, ours: prefixes of variant names; the ratio is fastest peer over fastest ours.
        dtype: of the products; the rates reached are shown as shares of :func:`matrix_rate` in it.
    """
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        group, variant = arguments.memory_of.split("::")
        _measure_memory(next(v for v in groups[group] if v.name == variant))
        return {}
    report: dict[str, Any] = {"name": name, **environment(arguments), "groups": {}}
    for label, variants in groups.items():
        calls = {v.name: v.prepare() for v in variants}
        times: dict[str, list[float]] = {v.name: [] for v in variants}
        system: dict[str, list[float]] = {v.name: [] for v in variants}
        rate, fresh = 0.0, []
        load = OtherLoad()
        for _ in range(arguments.repeats + 1):
            rate = max(rate, matrix_rate(dtype, 512, 1024))
            fresh.append(fresh_memory_rate())
            for variant in variants:
                start, taken = time.perf_counter(), os.times().system
                calls[variant.name]()
                times[variant.name].append(time.perf_counter() - start)
                system[variant.name].append(os.times().system - taken)
        others = load.cores()
        del calls
        rows = {}
        for variant in variants:
            t = times[variant.name][1:]
            rows[variant.name] = {
                "median_s": statistics.median(t),
                "min_s": min(t),
                "max_s": max(t),
                "system_s": statistics.median(system[variant.name][1:]),
                "gflops": None if variant.flops is None else variant.flops / statistics.median(t) / 1e9,
                "share_of_matrix_rate": None
                if variant.flops is None
                else variant.flops / statistics.median(t) / rate,
                "peak_bytes": None if arguments.no_memory else _memory_in_process(label, variant.name),
            }
        report["groups"][label] = {
            "matrix_rate": rate,
            "fresh_memory_rate": statistics.median(fresh),
            "variants": rows,
            **_ratios(rows, peer, ours),
            **disturbance(others),
        }
        _print_group(label, report["groups"][label], str(dtype).removeprefix("torch."))
    today = datetime.date.today().isoformat()
    output = arguments.output or RESULTS / f"{today}-{name}-{arguments.allocator}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {output}")
    return report


def disturbance(others: float | None) -> dict[str, Any]:
    """What a report says about other programs' use of the processors, in cores (None: unknown)."""
    return {"cores_used_by_others": others, "disturbed": (others or 0.0) > BUSY}


def warn(label: str, measured: dict[str, Any]) -> None:
    """Say so if ``measured``, with :func:`disturbance` in it, comes from a busy machine."""
    if measured["disturbed"]:
        cores = f"{measured['cores_used_by_others']:.1f} cores"
        print(f"note: the machine is busy: others used {cores} during {label}; measure again later")


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and command behind a result."""
    versions = {"openxlstm": openxlstm.__version__}
    peers = ("mlstm_kernels", "xlstm", "transformers", "llama-cpp-python")
    for package in ("torch", "triton", "numpy", *peers):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpu": cpu_info("model name") or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
        "allocator": arguments.allocator,
        "versions": versions,
    }


def _ratios(rows: dict[str, dict[str, Any]], peer: str, ours: str) -> dict[str, Any]:
    def best(prefix: str) -> str | None:
        names = [n for n in rows if n.startswith(prefix)]
        return min(names, key=lambda n: rows[n]["median_s"]) if names else None

    fast_peer, fast_ours = best(peer), best(ours)
    if fast_peer is None or fast_ours is None:
        return {}
    ratios = {
        "fastest_peer": fast_peer,
        "fastest_ours": fast_ours,
        "speed_ratio": rows[fast_peer]["median_s"] / rows[fast_ours]["median_s"],
    }
    a, b = rows[fast_ours]["peak_bytes"], rows[fast_peer]["peak_bytes"]
    if a and b:
        ratios["memory_ratio"] = a / b
    return ratios


def _print_group(label: str, group: dict[str, Any], dtype: str) -> None:
    print(
        f"\n{label}   ({dtype} matrices are multiplied at {group['matrix_rate'] / 1e9:.0f} GFLOP/s, fresh "
        f"memory written at {group['fresh_memory_rate'] / 1e9:.1f} GB/s)"
    )
    print(
        f"  {'variant':34s} {'median':>10s} {'min..max':>19s} {'system':>8s} {'GFLOP/s':>8s} {'of that':>8s} "
        f"{'peak MB':>8s}"
    )
    for name, row in group["variants"].items():
        rate = "" if row["gflops"] is None else f"{row['gflops']:.0f}"
        share = "" if row["gflops"] is None else f"{row['share_of_matrix_rate']:.0%}"
        memory = "" if not row["peak_bytes"] else f"{row['peak_bytes'] / 1e6:.0f}"
        spread = f"{row['min_s'] * 1e3:.0f}..{row['max_s'] * 1e3:.0f}"
        print(
            f"  {name:34s} {row['median_s'] * 1e3:8.1f}ms {spread:>17s}ms {row['system_s'] * 1e3:6.0f}ms "
            f"{rate:>8s} {share:>8s} {memory:>8s}"
        )
    if "speed_ratio" in group:
        memory = f", {group['memory_ratio']:.2f}x its memory" if "memory_ratio" in group else ""
        print(
            f"  {group['fastest_ours']} is {group['speed_ratio']:.2f}x as fast as "
            f"{group['fastest_peer']}{memory}"
        )
    warn(label, group)


def _memory_in_process(group: str, variant: str) -> int | None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--memory-of")]
    command = [sys.executable, sys.argv[0], *arguments, f"--memory-of={group}::{variant}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(result.stderr[-500:], file=sys.stderr)
        return None
    return int(result.stdout.strip().splitlines()[-1])


def _measure_memory(variant: Variant) -> None:
    """Print the high-water mark of a second call in bytes, over what was resident before it (Linux)."""
    call = variant.prepare()
    status = Path("/proc/self/status")

    def field(key: str) -> int:
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith(key)) * 1024

    call()
    gc.collect()
    loader.release()  # the call that is measured pays for its working space itself
    ctypes.CDLL(None).malloc_trim(0)
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    call()
    print(field("VmHWM") - before)
