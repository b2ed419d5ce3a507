"""Shared fixtures: reference vectors, a fixed seed for every test, one thread per worker."""

from __future__ import annotations

import importlib.util
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

if not torch.cuda.is_available():  # Triton reads this when it is first imported, by whatever test
    os.environ.setdefault("TRITON_INTERPRET", "1")


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


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels are tested: the GPU, or the CPU in Triton's interpreter. Skips without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install 'openxlstm[gpu]')")
    if torch.cuda.is_available():
        return torch.device("cuda")
    _repair_interpreted_bfloat16()
    return torch.device("cpu")


def _repair_interpreted_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as bits, multiplies those, and truncates where GPUs round."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder.create_dot, "repaired", False):
        return
    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar != tl.bfloat16 or a.data.dtype != np.uint16:
            return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(wide(a.data), wide(b.data))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(wide(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data, np.float32)).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return original_cast(self, src, dst_type)

    create_dot.repaired = True
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
