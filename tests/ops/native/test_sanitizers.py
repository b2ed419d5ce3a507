"""Random calls of the native library under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from openxlstm.ops.native import build


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_random_calls_are_clean(native, tmp_path, sanitizer):
    compiler = build.find_compiler()
    flags = [f for f in build.FLAGS if f != "-O3"]
    flags += ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{build.SOURCES}"]
    units = [
        ("kernels.cpp", name, [*isa, f"-DOXL_ISA={name}"]) for name, isa in build.instruction_sets().items()
    ]
    units += [("library.cpp", "library", []), (str(Path(__file__).with_name("fuzz.cpp")), "fuzz", [])]
    objects = []
    for source, name, own in units:
        objects.append(str(tmp_path / f"{name}.o"))
        command = [*compiler, *flags, *own, "-c", str(build.SOURCES / source), "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=200)
    program = str(tmp_path / "fuzz")
    link = subprocess.run(
        [*compiler, *flags, *objects, "-o", program], capture_output=True, text=True, check=False
    )
    if link.returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer: {link.stderr.splitlines()[-1]}")
    run = subprocess.run([program], capture_output=True, text=True, check=False, timeout=200)
    assert run.stdout == "done\n", run.stderr[-3000:]
