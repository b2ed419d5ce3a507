"""The native library, every instruction set this machine has, and a compiler whose calls are counted."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from openxlstm.ops.native import build, loader

sys.path.insert(0, str(Path(__file__).parents[1] / "mlstm"))  # the shared table of cases


@pytest.fixture
def native() -> None:
    """Skip where there is no native library."""
    reason = loader.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=sorted(build.instruction_sets()))
def isa(request: pytest.FixtureRequest, native: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each instruction set in turn."""
    available = loader.status().isas
    if request.param not in available:
        pytest.skip(f"this machine does not have {request.param}, only {', '.join(available)}")
    monkeypatch.setenv("OPENXLSTM_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class CountingCompiler(NamedTuple):
    """A compiler that notes what it is asked to compile, and an empty cache."""

    log: Path
    cache: Path

    def compiled(self) -> int:
        """How many times library.cpp was compiled."""
        return self.log.read_text().count("library.cpp") if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountingCompiler:
    """Make a fresh cache and a quick compiler that counts its work."""
    name = next((n for n in ("g++", "clang++", "c++") if shutil.which(n)), None)
    if name is None:
        pytest.skip("no C++ compiler: install g++ or clang to test compiling")
    made = CountingCompiler(tmp_path / "log", tmp_path / "cache")
    script = tmp_path / "counting-c++"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{made.log}"\nexec {name} "$@" -O0\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("OPENXLSTM_CACHE", str(made.cache))
    return made


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[], loader._Loaded]:
    """Find the library anew, past what this process has found already."""
    for name in ("OPENXLSTM_ISA", "OPENXLSTM_NATIVE"):
        if name in os.environ:
            monkeypatch.delenv(name)
    return loader._find.__wrapped__
