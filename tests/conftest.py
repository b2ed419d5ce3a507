"""Shared fixtures: reference vectors, a fixed seed for every test, one thread per worker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Load one reference case by name: its description and its tensors (see the spec, golden files)."""

    def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")

    return load


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, in float64."""
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-30))


@pytest.fixture(scope="session")
def rel_error() -> Callable[[Tensor, Tensor], float]:
    """The metric of every numerical comparison: relative Frobenius error in float64."""
    return relative_error
