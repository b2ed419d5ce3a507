"""Commands without a native library, or with a damaged or foreign one: they work, and say why slower."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from openxlstm.ops.native import build, loader

GENERATE = ("abc", "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu")
SLOWER = "openxlstm: several times slower than it could be: "


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Let the next command look for a library as a new process does, in an empty cache."""
    for name in ("OPENXLSTM_ISA", "OPENXLSTM_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENXLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "_shipped", lambda: tmp_path / "none")
    find = loader._find.__wrapped__

    def look() -> None:
        monkeypatch.setattr(loader, "_find", functools.cache(find))

    look()
    return look


@pytest.fixture
def library() -> str:
    """The library that this machine has."""
    path = loader.status().path
    if path is None:
        pytest.skip("no native library on this machine")
    return path


@pytest.fixture
def text(cli: Callable, model: Path) -> str:
    """What the model writes here, with the library that this machine has."""
    return cli("generate", model, *GENERATE).out


def test_without_compiler_and_library(text, anew, cli, model, recipe, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in (("generate", model, *GENERATE), ("train", recipe), ("bench", model, "--seconds", "0.05")):
        code, out, err = cli(*words)
        assert code == 0, err
        (line,) = [line for line in err.splitlines() if line.startswith("openxlstm:")]
        assert line.startswith(f"{SLOWER}no C++ compiler found: install g++ or clang")
        if words[0] == "generate":
            assert (out, err.count("\n")) == (text, 1)


def test_the_same_in_a_new_process(text: str, model: Path, tmp_path: Path) -> None:
    if loader._shipped().exists():
        pytest.skip("a library was built into this source tree")
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "OPENXLSTM_ISA")}
    environment |= {"PATH": str(tmp_path), "OPENXLSTM_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "openxlstm", "generate", str(model), *GENERATE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (0, text, 1)
    assert result.stderr.startswith(f"{SLOWER}no C++ compiler found")


def test_bfloat16_states_need_the_library(mistake: Callable, model: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    line = mistake("bench", model, "--state-dtype", "bf16")
    assert line == "--state-dtype bfloat16 needs native kernels: turned off by OPENXLSTM_NATIVE=0"


def test_read_only_cache(text, anew, cli, model, monkeypatch, tmp_path) -> None:
    """A file in its place refuses also the superuser."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENXLSTM_CACHE", str(tmp_path / "file" / "below"))
    code, out, err = cli("generate", model, *GENERATE)
    assert (code, out, err.count("\n")) == (0, text, 1)
    assert err.startswith(f"{SLOWER}the native library cannot be kept or loaded (Not a directory")
    assert "set OPENXLSTM_CACHE to a directory that can be written; using PyTorch" in err


def test_corrupt_cache_entry(text, library, anew, cli, model, monkeypatch, tmp_path) -> None:
    """It is compiled again; if that fails too, PyTorch does the work."""
    compiler = tmp_path / "c++"
    compiler.write_text(  # compiling takes a minute; this one has the result ready
        f'#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\n'
        f'case " $* " in *" -shared "*) cp "{library}" "$last"; echo linked >> "{tmp_path}/log";; esac\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert cli("generate", model, *GENERATE) == (0, text, "")
    (entry,) = (tmp_path / "cache").glob(f"*{build.SUFFIX}")
    for damaged in (entry.read_bytes()[:1000], bytes(entry.stat().st_size), b""):
        entry.unlink()  # it is mapped into this process
        entry.write_bytes(damaged)
        anew()
        assert cli("generate", model, *GENERATE) == (0, text, "")
    assert (tmp_path / "log").read_text() == "linked\n" * 4

    entry.unlink()
    entry.write_bytes(damaged)
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho error: no space\nexit 1\n')
    anew()
    code, out, err = cli("generate", model, *GENERATE)
    assert (code, out, err.count("\n")) == (0, text, 1)
    assert err.startswith(SLOWER)
    assert "failed: error: no space" in err


def test_library_for_another_processor(text, anew, cli, model, monkeypatch, tmp_path) -> None:
    """A wheel unpacked where it does not belong, and no compiler to make up for it."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xf7\x00" + bytes(44)  # a machine nobody has
    (tmp_path / "foreign.so").write_bytes(header)
    monkeypatch.setattr(loader, "_shipped", lambda: tmp_path / "foreign.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = cli("generate", model, *GENERATE)
    assert (code, out, err.count("\n")) == (0, text, 1)
    assert err.startswith(f"{SLOWER}the shipped native library does not load")


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_instruction_set_the_processor_lacks(library, mistake, model, monkeypatch, command) -> None:
    missing = "avx2" if "neon" in build.instruction_sets() else "neon"
    monkeypatch.setenv("OPENXLSTM_ISA", missing)
    line = mistake(command, model)
    assert line.startswith(f"OPENXLSTM_ISA={missing}: this machine does not have that instruction set.")
    assert "portable, or unset it" in line


def test_quantised_file_of_another_model(cli, mistake, model, tmp_path) -> None:
    quantised, narrow = tmp_path / "int8", tmp_path / "narrow"
    assert cli("quantize", model, quantised).code == 0
    shutil.copytree(model, narrow)
    weights = quantised / "model.safetensors"
    whole = load_file(weights)
    for wrong, message in (
        (load_file(model / "model.safetensors"), "tensor '"),  # not quantised
        ({name: tensor[:16] if tensor.ndim == 2 else tensor for name, tensor in whole.items()}, "shape"),
        ({name: tensor for name, tensor in whole.items() if "lm_head" not in name}, "lm_head"),
    ):
        weights.unlink()
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, weights)
        line = mistake("generate", quantised, *GENERATE)
        assert message in line
        assert str(quantised) in line
    weights.unlink()
    save_file(whole, narrow / "model.safetensors")  # quantised weights under a plain configuration
    assert "tensor '" in mistake("generate", narrow, *GENERATE)
