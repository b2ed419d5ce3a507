"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device(triton_device: torch.device) -> Iterator[torch.device]:
    """Run Triton kernels on the GPU or in the interpreter; what they are to fill starts as NaN, so anything
    left out or read too early shows."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        with triton_device:
            yield triton_device
    finally:
        torch.use_deterministic_algorithms(False)
