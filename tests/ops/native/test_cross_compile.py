"""The sources for other processors: compiled for ARM, where NEON is; random calls run in an emulator.

pip install ziglang && apt install qemu-user
pytest -m slow tests/ops/native/test_cross_compile.py
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openxlstm.ops.native import build

FLAGS = [flag for flag in build.FLAGS if flag != "-O3"]
INSTRUCTION_SETS = {"aarch64": ("neon", "portable"), "riscv64": ("portable",)}
"""Of processors that nobody here has; RISC-V stands for those that have the portable form only."""


def cross_compiler(machine: str) -> list[str]:
    """A compiler for Linux on ``machine``, if there is one."""
    if shutil.which(f"{machine}-linux-gnu-g++"):
        return [f"{machine}-linux-gnu-g++"]
    zig = ["zig"] if shutil.which("zig") else [sys.executable, "-m", "ziglang"]
    if zig[0] != "zig" and importlib.util.find_spec("ziglang") is None:
        pytest.skip(
            f"no compiler for {machine}: install g++-{machine}-linux-gnu, or zig (pip install ziglang)"
        )
    undefined = ["-fsanitize=undefined", "-fsanitize-trap=undefined"]  # without a runtime library to link
    return [*zig, "c++", "-target", f"{machine}-linux-musl", *undefined]


@pytest.fixture
def compile_for() -> Callable[..., None]:
    """Run the compiler for a machine; it must succeed without warnings."""

    def run(machine: str, *options: str) -> None:
        command = [*cross_compiler(machine), *FLAGS, "-Wall", "-Werror", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    return run


@pytest.mark.parametrize("source", ["kernels.cpp", "library.cpp"])
def test_compiles_for_arm_without_warnings(compile_for, source, tmp_path):
    isa = ["-DOXL_ISA=neon"] if source == "kernels.cpp" else []
    target = tmp_path / "object.o"
    compile_for("aarch64", "-O0", *isa, "-c", str(build.SOURCES / source), "-o", str(target))
    assert target.read_bytes()[18:20] == b"\xb7\x00"  # an ELF file for AArch64


@pytest.mark.slow
@pytest.mark.parametrize("machine", INSTRUCTION_SETS)
def test_random_calls_in_an_emulator(compile_for, machine, tmp_path):
    """fuzz.cpp, every instruction set of the machine, with traps where behaviour is undefined."""
    emulator = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if emulator is None:
        pytest.skip(f"no emulator of {machine}: install qemu-user")
    units = [("kernels.cpp", name, [f"-DOXL_ISA={name}"]) for name in INSTRUCTION_SETS[machine]]
    units += [("library.cpp", "library", []), (str(Path(__file__).with_name("fuzz.cpp")), "fuzz", [])]
    objects = [str(tmp_path / f"{name}.o") for _, name, _ in units]
    for (source, _, own), target in zip(units, objects, strict=True):
        options = ["-O1", f"-I{build.SOURCES}", *own]
        compile_for(machine, *options, "-c", str(build.SOURCES / source), "-o", target)
    program = str(tmp_path / "fuzz")
    compile_for(machine, "-static", *objects, "-o", program)
    run = subprocess.run([emulator, program], capture_output=True, text=True, check=False, timeout=900)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[-3000:]
