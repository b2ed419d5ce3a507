"""The machine: device, numeric type, seeds, its measured limits, and files that are never half-written.

Nothing here happens at import. Measurements (:func:`measure_peak_flops`, :func:`measure_bandwidth`) run once
per process and are remembered; they are the yardstick that every speed figure of the package is held against.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from openxlstm.config import nearest_name

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""Accepted names of floating point types."""

PRECISIONS = ("auto", "float32", "bfloat16")
"""What :func:`resolve_precision` understands."""


# ---------------------------------------------------------------------- device and dtype


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Turn a name into a device that exists here.

    Args:
        name: ``"auto"`` (an accelerator if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``,
            ``"mps"``, ...

    Raises:
        ValueError: no such kind of device, or it is not available on this machine.
    """
    if isinstance(name, str) and name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = nearest_name(str(name), ("auto", "cpu", "cuda", "mps", "xpu"))
        raise ValueError(f"unknown device {name!r}: use 'auto', 'cpu', 'cuda' or 'mps'.{hint}") from None
    if device.type in ("cpu", "meta"):
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        found = "only a CPU" if accelerator is None else f"a device of type '{accelerator.type}'"
        raise ValueError(f"device '{device}' is not available: this machine has {found}. Use device 'auto'")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device '{device}' does not exist: there are {count} devices, counted from 0")
    return device


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """Turn ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"`` (or ``fp32``, ...) into a dtype.

    Raises:
        ValueError: not a floating point type that models run in.
    """
    if isinstance(name, torch.dtype):
        if name not in DTYPES.values():
            raise ValueError(f"{name} is not a floating point type: use one of {', '.join(DTYPES)}")
        return name
    key = str(name).removeprefix("torch.").lower()
    if key not in DTYPES:
        raise ValueError(
            f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}.{nearest_name(key, DTYPES)}"
        )
    return DTYPES[key]


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 matrix products on ``device`` are faster than float32 ones.

    On a CPU this needs AVX512-BF16 or AMX; without them PyTorch emulates, tens of times slower.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return any(bool(_cpu_capabilities().get(flag)) for flag in ("avx512_bf16", "amx_bf16"))
    return kind == "xpu"


def resolve_precision(name: str, device: torch.device | str) -> torch.dtype | None:
    """The type for automatic mixed precision on ``device``, or None for plain float32.

    Args:
        name: ``"auto"`` (bfloat16 where it is fast, else float32), ``"float32"`` or ``"bfloat16"``.
        device: where the computation runs.

    Raises:
        ValueError: unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    if name not in PRECISIONS:
        hint = nearest_name(name, PRECISIONS)
        raise ValueError(f"unknown precision {name!r}: use one of {', '.join(PRECISIONS)}.{hint}")
    return torch.bfloat16 if name == "bfloat16" else None


@functools.cache
def _cpu_capabilities() -> dict[str, Any]:
    """CPU features and cache sizes as PyTorch sees them (empty where it cannot tell)."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        with contextlib.suppress(RuntimeError):
            return dict(query())
    probes = {
        "avx2": "_is_avx2_supported",
        "avx512_f": "_is_avx512_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_bf16": "_is_amx_tile_supported",
    }
    return {flag: getattr(torch.cpu, name)() for flag, name in probes.items() if hasattr(torch.cpu, name)}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's operations on the calling thread alone, for work that is small.

    Sharing tens of microseconds of work costs as much as it saves, PyTorch's threads go on spinning
    afterwards, and with another program on one of the cores every operation waits for the scheduler.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------- seeds


def end_with_parent() -> None:
    """In a worker process: leave when the process that started it is gone, even if that was killed."""

    def leave_after(sentinel: int) -> None:
        with contextlib.suppress(OSError):
            connection.wait([sentinel])
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=leave_after, args=(parent.sentinel,), daemon=True).start()


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices).

    The package draws from explicit generators wherever it can; this covers dropout and whatever user code
    draws globally.

    Raises:
        ValueError: ``seed`` is not in 0 ... 2**63 - 1.
    """
    import numpy as np

    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie between 0 and 2**63 - 1, got {seed}")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that replaces it on success and vanishes on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary name
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: str | Path) -> None:
    """Make created, renamed and removed names in ``path`` durable (a no-op where the system cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse to sync a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a crash or a full disk leaves either the old content or the new, never a mixture.

    Raises:
        OSError: the directory does not exist or is not writable, or the disk is full; ``path`` is untouched.
    """
    with _replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def atomic_write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write_bytes` of UTF-8 text; line ends are written as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


# ---------------------------------------------------------------------- measured limits


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _best_time(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time of one call to ``run`` among at least eight that fill ``seconds``, after a warm-up.

    The shortest, because on a shared machine the others measure the neighbours.
    """
    run()
    _synchronize(device)
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 8 or spent < seconds:
        start = time.perf_counter()
        run()
        _synchronize(device)
        elapsed = time.perf_counter() - start
        best, spent, repeats = min(best, elapsed), spent + elapsed, repeats + 1
    return best


def measure_peak_flops(
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seconds: float = 0.2,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.mm,
) -> float:
    """Floating point operations per second that this machine reaches in a plain matrix product.

    The bound for model-FLOP utilisation: measured, not taken from a data sheet, with the threads in use now.
    Sizes grow until the rate no longer improves. Remembered per dtype, device, thread count and product.

    Args:
        dtype: type of both factors.
        device: where to multiply.
        seconds: time spent on each size.
        product: what multiplies two matrices.
    """
    return _peak_flops(resolve_dtype(dtype), torch.device(device), torch.get_num_threads(), seconds, product)


@functools.cache
def _peak_flops(
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    seconds: float,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    best = 0.0
    for size in (256, 512, 1024) if device.type == "cpu" else (1024, 4096, 8192):
        if best and 2 * size**3 / best > 0.5:
            break  # so slow per product: it is as fast as it gets
        factor = torch.ones(size, size, dtype=dtype, device=device)
        elapsed = _best_time(functools.partial(product, factor, factor), device, seconds / 4)
        best = max(best, 2 * size**3 / elapsed)
    return best


def measure_bandwidth(
    device: torch.device | str = "cpu", *, megabytes: int = 256, seconds: float = 0.2
) -> float:
    """Bytes per second read from main memory, the bound of decoding at batch 1. Remembered like the above.

    Args:
        device: whose memory to read.
        megabytes: size of the array, chosen larger than any cache.
        seconds: time to spend.
    """
    return _bandwidth(torch.device(device), torch.get_num_threads(), megabytes, seconds)


@functools.cache
def _bandwidth(device: torch.device, threads: int, megabytes: int, seconds: float) -> float:
    array = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    return array.numel() * 4 / _best_time(array.sum, device, seconds)


# ---------------------------------------------------------------------- environment report


def environment_report(*, measure: bool = False) -> dict[str, Any]:
    """What a bug report needs: versions, processor, memory, threads, devices.

    Args:
        measure: also measure peak FLOP/s and memory bandwidth (about a second).

    Returns:
        A flat-ish dictionary that JSON can hold; :func:`render_report` turns it into text.
    """
    capabilities = _cpu_capabilities()
    flags = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            name = torch.cuda.get_device_name(index) if accelerator.type == "cuda" else ""
            devices.append(f"{accelerator.type}:{index} {name}".strip())
    report: dict[str, Any] = {
        "openxlstm": _version("openxlstm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(capabilities),
        "cpu_flags": [flag for flag in flags if capabilities.get(flag)],
        "cpu_count": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "fast_bfloat16": {
            name.split(" ")[0]: has_fast_bfloat16(name.split(" ")[0]) for name in devices
        },
        "devices": devices,
        "packages": {
            "torch": torch.__version__,  # its build too, which the metadata may lack
        }
        | {
            name: _version(name)
            for name in (
                "numpy", "safetensors", "tokenizers", "huggingface-hub", "triton",
                "matplotlib", "tensorboard", "transformers",
            )
        },
    }  # fmt: skip
    if measure:
        report["peak_gflops_float32"] = round(measure_peak_flops(torch.float32) / 1e9, 1)
        report["bandwidth_gbytes"] = round(measure_bandwidth() / 1e9, 1)
        if accelerator is not None:
            report[f"peak_tflops_bfloat16_{accelerator.type}"] = round(
                measure_peak_flops(torch.bfloat16, accelerator) / 1e12, 1
            )
    return report


def render_report(report: dict[str, Any]) -> str:
    """The report as aligned ``name: value`` lines, one nested level indented, ending in a newline."""
    lines: list[str] = []
    width = max(len(name) for name in report) + 1
    for name, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            inner = max((len(key) for key in value), default=0) + 1
            lines += [f"  {key + ':':<{inner}} {_text(entry)}" for key, entry in value.items()]
        else:
            lines.append(f"{name + ':':<{width}} {_text(value)}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def cpu_info(field: str) -> str | None:
    """What Linux says of the first processor, such as its ``"model name"``; None where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return None


def _processor_name(capabilities: dict[str, Any]) -> str:
    name = cpu_info("model name") or capabilities.get("cpu_name")
    return str(name or platform.processor() or platform.machine())


def _memory_gib() -> float | None:
    """Physical memory in GiB, or None where the system does not say."""
    if sys.platform == "win32":
        return None
    with contextlib.suppress(ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
