"""The sources compile for 64-bit ARM, where NEON is, if a compiler for it is on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from openxlstm.ops.native import build


@pytest.fixture
def arm_compiler():
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    if shutil.which("zig"):
        return ["zig", "c++", "-target", "aarch64-linux-gnu"]
    pytest.skip("no compiler for ARM: install g++-aarch64-linux-gnu, or zig (pip install ziglang)")


@pytest.mark.parametrize("source", ["kernels.cpp", "library.cpp"])
def test_compiles_for_arm_without_warnings(arm_compiler, source, tmp_path):
    environment = os.environ | {
        name: str(tmp_path) for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    }
    command = [*arm_compiler, *build.FLAGS, "-O0", "-Wall", "-Werror", "-c", str(build.SOURCES / source)]
    command += ["-DOXL_ISA=neon"] if source == "kernels.cpp" else []
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "object.o").read_bytes()[18:20] == b"\xb7\x00"  # an ELF file for AArch64
