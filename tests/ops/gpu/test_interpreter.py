"""What the tests of Triton kernels rest on: the repaired interpreter, poisoned outputs and margins."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops.gpu import support


def test_bfloat16_products_and_rounding(triton_device):
    """Without the repair the interpreter multiplies the bits of bfloat16 numbers as integers."""
    from small_kernels import product

    a, b = (torch.randn(16, 16, device=triton_device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product[(1,)](a, b, out, N=16)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_start_as_nan(device, dtype):
    x = torch.zeros(3, 4, dtype=dtype)
    for out in (torch.empty(3, 4, dtype=dtype), x.new_empty((3, 4)), torch.empty_like(x)):
        assert out.isnan().all()


def test_reads_and_writes_out_of_bounds_show(device):
    """What lies beyond a tensor is NaN, and a write there fails; tensors that share memory still do."""
    from small_kernels import copy

    guarded = support.Kernel(copy)
    x = torch.arange(8.0)
    out = torch.empty(32)
    guarded[(1,)](x, out, 4, N=8)
    assert torch.equal(out[4:12], x)
    assert out[12:].isnan().all()
    guarded[(1,)](x[2:6], out, 12, N=8)
    assert torch.equal(out[12:16], x[2:6])
    assert out[16:].isnan().all()
    for begin in (6, -2):
        with pytest.raises(AssertionError, match="writes out of bounds"):
            guarded[(1,)](out, x, begin, N=4)
    guarded[(1,)](x[2:], x, 0, N=4)
    assert x.tolist() == [2, 3, 4, 5, 4, 5, 6, 7]
