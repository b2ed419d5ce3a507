"""What the tests of Triton kernels rest on where there is no GPU: the repaired interpreter."""

from __future__ import annotations

import torch


def test_bfloat16_products_and_rounding(triton_device):
    """Without the repair the interpreter multiplies the bits of bfloat16 numbers as integers."""
    from bfloat16_product import product

    a, b = (torch.randn(16, 16, device=triton_device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product[(1,)](a, b, out, N=16)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())
