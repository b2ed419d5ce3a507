"""The command itself: help, version, unknown words, errors as one line, exit codes."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import openxlstm
from openxlstm.cli import main as frame
from openxlstm.cli.options import parse
from openxlstm.cli.train import TrainOptions

PROGRAM = [sys.executable, "-m", "openxlstm.cli"]


def test_help_lists_every_command_and_imports_no_torch() -> None:
    program = (
        "import sys; from openxlstm.cli.main import main; code = main(['--help']); "
        "assert 'torch' not in sys.modules and 'tyro' not in sys.modules; sys.exit(code)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10
    for command in frame.COMMANDS:
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help(cli: Callable, words: list[str]) -> None:
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    assert out.startswith("usage: openxlstm COMMAND")


def test_version(cli: Callable) -> None:
    assert cli("--version") == (0, f"openxlstm {openxlstm.__version__}\n", "")


@pytest.mark.parametrize("command", list(frame.COMMANDS))
def test_help_of_a_command(cli: Callable, command: str) -> None:
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: openxlstm {command}")
    assert "examples:" in out


def test_help_of_train_teaches_every_setting(cli: Callable) -> None:
    out = cli("train", "--help").out
    for name in ("--train.learning-rate", "--train.schedule", "--data.context-length", "--resume"):
        assert name in out


def test_unknown_command(mistake: Callable) -> None:
    assert "Did you mean 'generate'?" in mistake("genrate", code=[2])


def test_unknown_option(mistake: Callable) -> None:
    line = mistake("generate", "model", "--max-new-token", "3", code=[2])
    assert "--max-new-token" in line
    assert "Did you mean --max-new-tokens?" in line


def test_ill_typed_option(mistake: Callable) -> None:
    assert "'many'" in mistake("generate", "model", "--max-new-tokens", "many", code=[2])


def test_missing_argument(mistake: Callable) -> None:
    assert "openxlstm train needs RECIPE.yaml (the recipe);" in mistake("train", code=[2])
    line = mistake("convert", code=[2])
    assert "needs SOURCE (checkpoint directory, weight file, or hub id) and TARGET (directory" in line


def test_help_exits_with_zero() -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(TrainOptions, ["--help"], command="train")
    assert not leaving.value.code


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("openxlstm.cli.doctor.run", run)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (FileNotFoundError("'x' does not exist"), 1, "'x' does not exist"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x"),
            1,
            "No such file or directory: 'x'",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied: 'x'"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "not enough memory"),
        (MemoryError(), 1, "not enough memory"),
        (ArithmeticError("the loss is nan"), 1, "the loss is nan"),
        (ImportError("no matplotlib", name="matplotlib"), 1, "pip install 'openxlstm[train]'"),
        (ImportError("no transformers", name="transformers"), 1, "pip install 'openxlstm[hf]'"),
        (KeyError("surprise"), 1, "please report it"),
    ],
)
def test_errors_are_one_line(
    mistake: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, text: str
) -> None:
    fail_with(monkeypatch, error)
    assert text in mistake("doctor", code=[code])


def test_debug_shows_the_trace(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        cli("doctor", "--debug")
    monkeypatch.setenv("OPENXLSTM_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli("doctor")


def test_interruption(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt("saved; resume with X"))
    code, _, err = cli("doctor")
    assert code == 130
    assert err.strip() == "openxlstm: interrupted: saved; resume with X"


def test_reader_that_leaves() -> None:
    """``openxlstm doctor | head`` ends quietly."""
    program = f"{sys.executable} -m openxlstm.cli inspect recipes/xlstm_7b.yaml | head -n 1"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(program, shell=True, capture_output=True, text=True, cwd=root)
    assert result.stderr == ""
    assert result.stdout.startswith("model")


def test_process_exit_code() -> None:
    result = subprocess.run([*PROGRAM, "generate", "nowhere", "x"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("openxlstm: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["data", "--help"]])
def test_output_that_cannot_be_written(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("openxlstm: error: the disk is full")
    assert result.stderr.count("\n") == 1


def test_output_in_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("openxlstm.cli.doctor.run", lambda _: print("caf\u00e9", file=stdout))
    monkeypatch.setattr("sys.stdout", stdout)
    assert frame.main(["doctor"]) == 0
    assert stdout.buffer.getvalue() == b"caf?\n"  # type: ignore[attr-defined]
