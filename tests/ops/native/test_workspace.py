"""The working space that the library keeps from one call to the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openxlstm.ops import causal_convolution, head_norm, mlstm, rnn
from openxlstm.ops.matmul import matmul
from openxlstm.ops.native import loader


def mlstm_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(2, size, 2, d) for d in (size // 2 + 3, size // 2 + 3, size + 1)]
    x += [torch.randn(2, size, 2), torch.randn(2, size, 2) + 3]
    return results(lambda *x: mlstm(*x, backend="native"), x, value)


def bfloat16_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(2, size, 2, d).bfloat16() for d in (size // 2 + 3, size // 2 + 3, size + 1)]
    x += [torch.randn(2, size, 2), torch.randn(2, size, 2) + 3]
    return results(lambda *x: mlstm(*x, backend="native"), x, value)


def rnn_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(3, size, 4, 2, size), torch.randn(4, 2, size, size), torch.randn(4, 2, size)]
    return results(lambda *x: rnn("slstm", *x, backend="native"), x, value)


def matmul_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(size, size + 3), torch.randn(size + 3, 2 * size)]
    return results(lambda *x: matmul(*x, backend="native"), x, value)


def convolution_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(2, size, 2 * size), torch.randn(2 * size, 4), torch.randn(2 * size)]
    return results(lambda x, w, b: causal_convolution(x, w, b, backend="native"), x, value)


def head_norm_call(size: int, value: float | None = None) -> list[torch.Tensor]:
    x = [torch.randn(size, 2, size), torch.randn(2 * size)]
    return results(lambda *x: head_norm(*x, backend="native"), x, value)


def results(function, x: list[torch.Tensor], value: float | None) -> list[torch.Tensor]:
    """Values and gradients; with every input full of ``value`` if one is given."""
    x = [(t if value is None else torch.full_like(t, value)).requires_grad_() for t in x]
    y = function(*x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), x)]


@pytest.mark.parametrize(
    "call", [mlstm_call, bfloat16_call, rnn_call, matmul_call, convolution_call, head_norm_call]
)
def test_what_an_earlier_call_left_there_does_not_matter(isa, call):
    loader.release()
    torch.manual_seed(0)
    expected = call(37)
    call(70, torch.nan)
    torch.manual_seed(0)
    for actual, wanted in zip(call(37), expected, strict=True):
        assert torch.equal(actual, wanted)
        assert not actual.isnan().any()


RESIDENT = """
import torch
from openxlstm.ops import mlstm
from openxlstm.ops.native import loader

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

# the states of every chunk: more than 40 MiB, which the C library returns to the system when it is freed
x = [torch.randn(1, 8192, 1, d) for d in (256, 256, 512)] + [torch.zeros(1, 8192, 1) for _ in range(2)]
x = [t.requires_grad_() for t in x]
mlstm(*x, backend="native").sum().backward()
before = resident()
loader.release()
assert resident() < before - (32 << 20), (before, resident())
loader.release()  # nothing is there any more
assert torch.isfinite(mlstm(*x, backend="native").sum())
"""


def test_it_is_given_back_when_asked_for(native):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    subprocess.run([sys.executable, "-c", RESIDENT], check=True)
