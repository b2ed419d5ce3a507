"""What would make this machine faster, a line each: what is the matter, and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from openxlstm.ops.native import loader
from openxlstm.ops.native.loader import Status

SLOW_MEMORY = 20.0
"""GB/s below which one more memory module, or smaller weights, make decoding noticeably faster."""


def say_if_slow(device: torch.device) -> None:
    """One line on standard error if only a missing native library keeps a CPU from being fast."""
    status = loader.status()
    if device.type == "cpu" and status.tier == "unavailable":
        print(f"openxlstm: several times slower than it could be: {status.reason}", file=sys.stderr)


def usable_cores() -> int:
    """Cores that this process may use; two hyperthreads count as one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        shared = Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        shared = False
    return max(1, count // 2) if shared else count


def advice(
    native: Status,
    *,
    cores: int,
    bfloat16_units: bool,
    bandwidth: float | None = None,
    cores_used_by_others: float | None = None,
) -> list[str]:
    """One line per thing that could be better.

    Args:
        native: of the native kernels.
        cores: that this process may use.
        bfloat16_units: whether the processor multiplies bfloat16 matrices itself.
        bandwidth: measured, bytes per second, or None.
        cores_used_by_others: measured, or None.
    """
    lines = [_about_native(native), _about_threads(native.threads, cores)]
    if not bfloat16_units:
        lines.append(
            "this processor has no bfloat16 units: bfloat16 saves memory and no time; train in float32 and "
            "decode with int8 weights (openxlstm quantize)"
        )
    busy = cores_used_by_others is not None and cores_used_by_others > 0.25
    if bandwidth is not None and bandwidth < SLOW_MEMORY * 1e9 and not busy:
        lines.append(
            f"memory is read at {bandwidth / 1e9:.0f} GB/s, which bounds decoding: int8 or int4 weights "
            "(openxlstm quantize) are a half or a quarter of the bytes, and a module in an empty memory "
            "channel adds to the rate"
        )
    if busy:
        lines.append(
            f"other processes use {cores_used_by_others:.1f} of {cores} cores: everything here, and every "
            "figure, is slower for it; stop them or measure later"
        )
    return [line for line in lines if line is not None]


def _about_native(native: Status) -> str | None:
    if native.tier == "disabled":
        return "OPENXLSTM_NATIVE=0 turns native kernels off, and decoding is several times slower: unset it"
    if native.reason is not None:
        return f"no native kernels, and decoding is several times slower: {native.reason}"
    if native.isa != native.isas[0]:
        return f"OPENXLSTM_ISA={native.isa} forces a slower instruction set than {native.isas[0]}: unset it"
    if native.isa == "portable" and platform.machine().lower() in ("x86_64", "amd64"):
        return (
            "this processor has no AVX2, so native kernels run in their portable form: a newer one is faster"
        )
    return None


def _about_threads(threads: int, cores: int) -> str | None:
    if threads < cores:
        cause = "unset OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "set OMP_NUM_THREADS"
        value = "" if os.environ.get("OMP_NUM_THREADS") else f"={cores}"
        return f"{threads} of {cores} cores are used: {cause}{value}, or call torch.set_num_threads({cores})"
    if threads > cores:
        return f"{threads} threads share {cores} cores and wait for each other: set OMP_NUM_THREADS={cores}"
    return None
