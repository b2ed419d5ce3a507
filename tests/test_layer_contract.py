"""Imports point down only, and optional packages stay where they belong (the contracts in pyproject.toml)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "openxlstm"


def test_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    program = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("matplotlib", {"plots.py"}),
        ("tensorboard", {"training/logging.py"}),
        ("huggingface_hub", {"checkpoint/hub.py"}),
        ("lm_eval", {"evaluation/harness.py"}),
        ("transformers", {"evaluation/mamba.py"}),
        ("triton", {path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("ops/*/triton_*.py")}),
        ("tyro", {path.relative_to(SOURCE).as_posix() for path in (SOURCE / "cli").glob("*.py")}),
    ],
)
def test_optional_packages_have_one_home(package: str, homes: set[str]) -> None:
    statement = re.compile(rf"^\s*(?:from|import) (?:torch\.utils\.)?{package}\b", re.MULTILINE)
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if statement.search(path.read_text())
    }
    assert users <= homes
