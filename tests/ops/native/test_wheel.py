"""The build hook: which wheel comes out, with which library, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
ROOT = Path(__file__).parents[3]
LIBRARY = "openxlstm/ops/native/libopenxlstm.so"
pytestmark = pytest.mark.skipif(not (ROOT / "hatch_build.py").exists(), reason="not in a source tree")


@pytest.fixture
def compiler(tmp_path):
    """A compiler that writes what it is asked for, without a look at the source."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done\nexit 0\n'
    )
    script.chmod(0o755)
    return script


def wheel(directory, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    made = list(Path(directory).glob("*.whl"))
    return result, made[0] if made else None


def test_the_library_is_in_a_wheel_of_this_platform(compiler, tmp_path):
    result, made = wheel(tmp_path, CXX=str(compiler), OPENXLSTM_BUILD_NATIVE="1")
    assert result.returncode == 0, result.stdout
    assert made is not None
    assert "-py3-none-" in made.name
    assert "-any.whl" not in made.name
    assert "manylinux" not in made.name
    with zipfile.ZipFile(made) as archive:
        assert archive.read(LIBRARY) == b"compiled\n"
    assert not (ROOT / "src" / LIBRARY).exists()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler", "OPENXLSTM_BUILD_NATIVE": ""}, "'no-such-compiler', does not exist"),
        ({"OPENXLSTM_BUILD_NATIVE": "0"}, "OPENXLSTM_BUILD_NATIVE=0"),
    ],
)
def test_a_pure_wheel_says_why(environment, reason, tmp_path):
    result, made = wheel(tmp_path, **environment)
    assert result.returncode == 0, result.stdout
    assert made is not None
    assert made.name.endswith("-py3-none-any.whl")
    assert "pure Python wheel, without the native library" in result.stdout
    assert reason in " ".join(result.stdout.split())
    with zipfile.ZipFile(made) as archive:
        assert LIBRARY not in archive.namelist()


def test_a_required_library_that_cannot_be_made_is_an_error(tmp_path):
    result, made = wheel(tmp_path, CXX="no-such-compiler", OPENXLSTM_BUILD_NATIVE="1")
    assert result.returncode
    assert made is None
    assert "'no-such-compiler', does not exist" in result.stdout
