"""Finds, or compiles once, the native library, and tells why there is none.

Three tiers: a library shipped beside this file; one compiled on first use into a cache directory, keyed by
sources, compiler, flags and processor; none, with the reason, and PyTorch does the work. Importing this
module does nothing; the first call that asks does. A missing compiler, an unwritable cache or a corrupt entry
never raises.

Environment: ``OPENXLSTM_NATIVE=0`` turns native kernels off. ``OPENXLSTM_CACHE`` names the cache directory.
``OPENXLSTM_ISA`` forces an instruction set; one the machine lacks is an error. ``CXX`` names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from openxlstm.config import nearest_name
from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import build

Tier = Literal["shipped", "compiled", "unavailable", "disabled"]


@dataclass(frozen=True)
class Status:
    """What serves native calls in this process."""

    tier: Tier
    path: str | None
    """The library in use."""
    isa: str | None
    """The instruction set in use."""
    isas: tuple[str, ...]
    """The instruction sets this machine and the library have, best first."""
    threads: int
    """Threads a call uses: those of PyTorch."""
    reason: str | None
    """Why there is no library; None if there is one."""


@dataclass(frozen=True)
class _Loaded:
    tier: Tier
    path: Path | None = None
    library: Any = None
    isas: tuple[tuple[str, int], ...] = ()
    """Names of the usable instruction sets and their numbers in the library, best first."""
    reason: str | None = None


_LOCK = threading.Lock()


def status() -> Status:
    """Tier, path, instruction sets and threads; finds or compiles the library if that has not happened yet.

    Raises:
        ValueError: ``OPENXLSTM_ISA`` names an instruction set this machine lacks.
    """
    if (reason := disabled()) is not None:
        return Status("disabled", None, None, (), torch.get_num_threads(), reason)
    loaded = _load()
    names = tuple(name for name, _ in loaded.isas)
    isa = names[0] if loaded.library is not None else None
    if loaded.library is not None:
        isa = next(name for name, number in loaded.isas if number == _isa(loaded))
    path = None if loaded.path is None else str(loaded.path)
    return Status(loaded.tier, path, isa, names, torch.get_num_threads(), loaded.reason)


def disabled() -> str | None:
    """The reason if the environment turns native kernels off."""
    return "turned off by OPENXLSTM_NATIVE=0" if os.environ.get("OPENXLSTM_NATIVE") == "0" else None


def unavailable() -> str | None:
    """Why native kernels cannot run, or None if they can; finds or compiles the library the first time.

    Raises:
        ValueError: ``OPENXLSTM_ISA`` names an instruction set this machine lacks.
    """
    return status().reason


# What torch.compiler.assume_constant_result does, without its import of the compiler (more than a second): a
# compiled graph keeps the answer it got.
setattr(unavailable, "_dynamo_marked_constant", True)  # noqa: B010


def refuse(request: Request, *, differentiable: bool) -> str | None:
    """Why a backend made of native kernels cannot serve a request, or None.

    Args:
        request: of an operator.
        differentiable: whether the backend has a backward pass.

    Raises:
        ValueError: ``OPENXLSTM_ISA`` names an instruction set this machine lacks.
    """
    if request.device.type != "cpu":
        return f"runs on CPUs, not on {request.device.type}"
    if request.dtype == torch.float64:
        return "computes in float32, not float64"
    if not differentiable and request.options.get("needs_grad"):
        return "has no backward pass"
    return unavailable()


def call(function: str, arguments: ctypes.Structure) -> None:
    """Run a function of the library on PyTorch's number of threads; the library must be available."""
    loaded = _load()
    code = getattr(loaded.library, function)(_isa(loaded), torch.get_num_threads(), ctypes.byref(arguments))
    if code:
        raise MemoryError(f"{function}: no memory for the working space of the kernel")


def release() -> None:
    """Give back the working space, at most 128 MiB, that the library keeps from one call to the next."""
    if _find.cache_info().currsize and (loaded := _load()).library is not None:
        loaded.library.oxl_release()


def _isa(loaded: _Loaded) -> int:
    """Number of the instruction set to use."""
    wanted = os.environ.get("OPENXLSTM_ISA")
    if not wanted:
        return loaded.isas[0][1]
    for name, number in loaded.isas:
        if name == wanted:
            return number
    names = [name for name, _ in loaded.isas]
    raise ValueError(
        f"OPENXLSTM_ISA={wanted}: this machine does not have that instruction set."
        f"{nearest_name(wanted, names)} Choose one of: {', '.join(names)}, or unset it"
    )


def cache_directory() -> Path:
    """Where compiled libraries are: ``$OPENXLSTM_CACHE``, or ``openxlstm`` in the user's cache directory."""
    if chosen := os.environ.get("OPENXLSTM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "openxlstm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openxlstm"


def _load() -> _Loaded:
    with _LOCK:
        return _find()


@cache
def _find() -> _Loaded:
    unloadable = ""
    if (shipped := _shipped()).exists():
        try:
            return _open("shipped", shipped)
        except OSError as error:  # made for a newer C library, or damaged: this machine's own may do
            unloadable = f"the shipped native library does not load ({error}); "
    try:
        if os.name != "posix":
            return _Loaded(
                "unavailable", reason=f"{unloadable}native kernels need Linux or macOS; using PyTorch"
            )
        return _compiled()
    except RuntimeError as error:  # BuildError, or a user without a home directory
        reason = str(error)
    except OSError as error:
        where = error.filename or cache_directory()
        reason = (
            f"the native library cannot be kept or loaded ({error.strerror or error}: {where}); "
            "set OPENXLSTM_CACHE to a directory that can be written"
        )
    return _Loaded("unavailable", reason=f"{unloadable}{reason}; using PyTorch")


def _shipped() -> Path:
    """Where the build hook of the wheel puts the library."""
    return build.SOURCES / f"libopenxlstm{build.SUFFIX}"


def _compiled() -> _Loaded:
    """The library of the cache, compiled first if it is not there or not whole."""
    import fcntl

    compiler = build.find_compiler()
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"native-{build.fingerprint(compiler)}{build.SUFFIX}"
    if not _whole(target):
        with (directory / "native.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file closes, or the process dies
            if not _whole(target):
                if sys.stderr.isatty():
                    print("openxlstm: compiling native kernels, once ...", file=sys.stderr, flush=True)  # noqa: T201
                build.build(compiler, target)
                _checksum_path(target).write_text(_checksum(target))
    return _open("compiled", target)


def _checksum_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _whole(library: Path) -> bool:
    """Whether the library is there and what was compiled: loading a damaged one can end the process."""
    try:
        return _checksum_path(library).read_text() == _checksum(library)
    except OSError:
        return False


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch brought; None where it brought none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in (*folder.glob("libgomp*.so*"), *folder.glob("libiomp*.so*")):
        try:
            entry = ctypes.CDLL(str(name), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def _open(tier: Tier, path: Path) -> _Loaded:
    library = ctypes.CDLL(str(path))
    library.oxl_isa_name.restype = ctypes.c_char_p
    library.oxl_borrow(ctypes.c_void_p(_openmp()))
    isas = tuple(
        (library.oxl_isa_name(number).decode(), number)
        for number in range(library.oxl_isa_count())
        if library.oxl_isa_available(number)
    )
    return _Loaded(tier, path, library, isas)
