"""Every file in ``examples/`` runs, in a directory of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXPECTED = {
    "state_tracking": "slstm-no-recurrence: accuracy at lengths 40 to 256: 0.",
    "text_score": "bits per byte: ",
    "backbone": "same result: True",
    "cells": "gru: (2, 50, 4, 16)",
    "export": "compiled, same logits: True",
    "documents": "gradient in the documents before it: 0.0\nchosen by 'auto'",
    "lstm_replacement": "[(7, 64), (31, 64), (12, 64)]",
    "state": "next tokens: [",
    "to_transformers": "largest difference:",
    "train_and_generate": "tokens in",
    "parity": "accuracy at length 100: ",
    "scaling_law": "doubts: none\n1e20 FLOPs, xlstm: ",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    if path.stem == "to_transformers":
        pytest.importorskip("transformers")
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for line in EXPECTED[path.stem].split("\n"):
        assert line in result.stdout


def test_examples_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name
