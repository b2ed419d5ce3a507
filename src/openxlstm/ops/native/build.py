"""Compiles the native library from the sources beside this file. Needs nothing but a C++17 compiler.

The kernels are one source, compiled once per instruction set with that set's flags; ``library.cpp`` chooses
among them at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
SUFFIX = ".so"
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma")
_X86 = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
_ARM = {"neon": (), "portable": ()}


class BuildError(RuntimeError):
    """The library cannot be built; the message says why and what to do."""


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Name and compiler flags of every instruction set the library has on this kind of processor."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return _X86
    return _ARM if machine in ("aarch64", "arm64") else {"portable": ()}


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, g++, clang++ or c++.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the C++ compiler named by CXX, '{chosen[0]}', does not exist")
        return chosen
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(
        "no C++ compiler found: install g++ or clang (Debian and Ubuntu: apt install g++; macOS: "
        "xcode-select --install)"
    )


def fingerprint(compiler: list[str]) -> str:
    """Names the library these sources, this compiler and this kind of processor make.

    Raises:
        BuildError: the compiler does not run.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(_run([*compiler, "--version"]).encode())
    digest.update(repr((FLAGS, instruction_sets(), platform.system(), platform.machine())).encode())
    return digest.hexdigest()[:24]


def build(compiler: list[str], target: Path) -> None:
    """Compile and link the library, and put it at ``target`` in one step.

    Raises:
        BuildError: the compiler fails. OSError: the directory of ``target`` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as directory:
        work = Path(directory)
        compile_one = [*compiler, *FLAGS, "-c"]
        kernels = str(SOURCES / "kernels.cpp")
        commands = [
            [*compile_one, *flags, f"-DOXL_ISA={name}", kernels, "-o", str(work / f"{name}.o")]
            for name, flags in instruction_sets().items()
        ]
        commands.append([*compile_one, str(SOURCES / "library.cpp"), "-o", str(work / "library.o")])
        jobs = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
        ]
        outputs = [job.communicate()[0] for job in jobs]
        for command, job, output in zip(commands, jobs, outputs, strict=True):
            if job.returncode:
                raise BuildError(_failure(command, output))
        objects = [command[-1] for command in commands]
        library = work / f"library{SUFFIX}"
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(library)])
        os.replace(library, target)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"the C++ compiler '{command[0]}' does not run: {error}") from error
    if result.returncode:
        raise BuildError(_failure(command, result.stdout))
    return result.stdout


def _failure(command: list[str], output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines() or ["?"]
    return (
        f"the C++ compiler '{command[0]}' failed: {lines[0].strip()} (it must be g++ 10, clang 10 or newer)"
    )
