"""Products for decoding: the definition in float64, bits that depend on nothing else, ragged sizes."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops.products import dense_weight, multiply, use_huge_pages

SIZES = [(1, 1), (3, 5), (8, 32), (17, 31), (40, 33), (129, 100), (64, 768)]  # (out, in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition(isa, rel_error, size, dtype):
    torch.manual_seed(0)
    weight = torch.randn(size).to(dtype)
    for batch in (0, 1, 2, 3, 7, 8, 13):
        x = torch.randn(batch, size[1])
        y = multiply(dense_weight(weight), x)
        assert y.shape == (batch, size[0])
        assert y.dtype == torch.float32
        if batch:
            assert rel_error(y, x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_batch_nor_threads(isa, threads, dtype):
    torch.manual_seed(0)
    weight = torch.randn(203, 77).to(dtype)
    x = torch.randn(11, 77)
    threads(1)
    expected = multiply(dense_weight(weight), x)
    for count in (1, 2, 3):
        threads(count)
        for batch in range(1, 12):
            assert torch.equal(multiply(dense_weight(weight), x[:batch]), expected[:batch])
            assert torch.equal(multiply(dense_weight(weight), x[-batch:]), expected[-batch:])


def test_nothing_but_numbers_of_this_row_counts(isa):
    weight, x = torch.ones(9, 40), torch.ones(3, 40)
    weight[4], x[1] = torch.nan, torch.inf
    y = multiply(dense_weight(weight), x)
    assert y[:, 4].isnan().all()
    assert (y[1].isinf() | y[1].isnan()).all()
    assert (y[[0, 2]][:, [0, 1, 2, 3, 5, 6, 7, 8]] == 40).all()


def test_what_it_refuses():
    for wrong in (torch.ones(2), torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 3, device="meta")):
        with pytest.raises(ValueError, match=r"the weight must be a float32 or bfloat16 matrix \(out, in\)"):
            dense_weight(wrong)
    with pytest.raises(ValueError, match="must be contiguous"):
        dense_weight(torch.ones(3, 2).T)
    with pytest.raises(ValueError, match=r"x must be \(batch, 3\), got \(1, 2\)"):
        multiply(dense_weight(torch.ones(2, 3)), torch.ones(1, 2))


def test_huge_pages_change_nothing(native):
    for size in (1, 3000, 3 << 20):  # inside a page, and over several
        x = torch.arange(size, dtype=torch.float32)
        use_huge_pages(x)
        assert torch.equal(x, torch.arange(size, dtype=torch.float32))
