"""Packed int8 and int4 matrices: layouts, rounding, scale search, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.ops.quantization import METHODS, check_packed, dequantize, quantize
from openxlstm.ops.quantization.codes import pack_int4, unpack_int4

SCHEMES = [(8, 32), (4, 32), (4, 64)]


def error(weight, packed: Any, moments=None):
    difference = (dequantize(*packed, weight.shape[1]) - weight.float()).square()
    return float((difference if moments is None else difference * moments).sum())


def test_int4_layout():
    """Byte j of a block: input j low, input j + 16 high."""
    codes = (torch.arange(128).reshape(2, 64) % 16 - 8).to(torch.int8)
    packed = pack_int4(codes)
    for r in range(2):
        for c in range(64):
            byte = int(packed[r, c // 32 * 16 + c % 16])
            assert (byte & 15 if c % 32 < 16 else byte >> 4) - 8 == codes[r, c]
    assert torch.equal(unpack_int4(packed), codes)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 150), st.sampled_from(SCHEMES), st.sampled_from(METHODS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(-30, 30), st.integers(0, 99),
)  # fmt: skip
def test_any_matrix(rows, columns, scheme, method, dtype, exponent, seed):
    bits, group = scheme
    torch.manual_seed(seed)
    weight = (torch.randn(rows, columns) * 2.0**exponent).to(dtype)
    packed = quantize(weight, bits, group=group, method=method, importance=torch.rand(columns))
    assert check_packed(*packed, columns) == (0 if bits == 8 else group)
    values = dequantize(*packed, columns)
    assert values.shape == weight.shape
    step = packed.scales.float().abs().reshape(rows, -1)
    width = columns if bits == 8 else group
    step = step.repeat_interleave(width, 1)[:, :columns]
    # within half a step, or more where the range is cut off: int4 has no 8, and the search clips a little
    slack = 0.51 if bits == 8 and method == "plain" else 2.5 if bits == 4 else 13.0
    assert ((values - weight.float()).abs() <= slack * step + 1e-38).all()


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_search_never_does_worse_than_plain(bits, group):
    weight = torch.randn(64, 256) * torch.rand(256).exp()
    moments = torch.rand(256) ** 4 * 10
    plain = quantize(weight, bits, group=group, method="plain")
    searched = quantize(weight, bits, group=group, method="error-aware")
    weighted = quantize(weight, bits, group=group, method="importance", importance=moments)
    assert error(weight, searched) < error(weight, plain)
    assert error(weight, weighted, moments) < error(weight, searched, moments)
    assert error(weight, searched) < error(weight, weighted)


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_exact_where_exact_is_possible(bits, group, method):
    limit = 127 if bits == 8 else 7
    codes = torch.randint(-limit, limit + 1, (6, 128)).float()
    codes[:, ::group] = -limit - (bits == 4)  # every group spans the range
    codes[4] = 0  # a row of zeros
    weight = codes * torch.tensor([2.0, 0.5, 1e-3, 4.0, 1.0, -8.0]).bfloat16().float()[:, None]
    packed = quantize(weight, bits, group=group, method=method, importance=torch.ones(128))
    torch.testing.assert_close(dequantize(*packed, 128), weight, rtol=1e-6, atol=0)


def test_constant_and_single_valued_groups():
    for value in (0.0, 1.0, -3.0, 1e-42, 1e30):
        weight = torch.full((2, 40), value)
        for bits in (8, 4):
            values = dequantize(*quantize(weight, bits, method="plain"), 40)
            torch.testing.assert_close(values, weight, rtol=0.004, atol=1e-41)


def test_codes_belong_to_the_rounded_scale():
    """Rounding the scale to bfloat16 moves it by up to 0.4 %: codes chosen before would be off by more."""
    weight = torch.randn(200, 32)
    packed = quantize(weight, 4, method="plain")
    scale = packed.scales.float()
    codes = unpack_int4(packed.codes).float()
    assert torch.equal(codes, (weight / scale).round().clamp(-8, 7))


def test_what_it_refuses():
    weight = torch.ones(2, 40)
    bad_options: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bits": 3}, "bits must be 8 or 4, got 3"),
        ({"bits": 4, "group": 16}, "group must be 32 or 64 inputs per scale, got 16"),
        ({"bits": 4, "method": "importanse"}, "Did you mean 'importance'"),
        ({"bits": 4, "method": "importance"}, "needs the second moments of the inputs of x.weight"),
        ({"bits": 4, "method": "importance", "importance": torch.ones(3)}, "must be 40 finite numbers"),
        ({"bits": 4, "method": "importance", "importance": -torch.ones(40)}, "none negative"),
    )
    for options, message in bad_options:
        with pytest.raises(ValueError, match=message):
            quantize(weight, name="x.weight", **options)
    for bad in (torch.nan, torch.inf):
        weight[1, 3] = bad
        with pytest.raises(ValueError, match=r"blocks\.0\.q\.weight holds NaN or infinite numbers"):
            quantize(weight, 8, name="blocks.0.q.weight")
    for wrong in (torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(ValueError, match="must be a floating point matrix"):
            quantize(wrong, 8)
    packed = quantize(torch.ones(2, 40), 4)
    for wrong in (
        (packed.codes, packed.scales, 70),
        (packed.codes, packed.scales.float(), 40),
        (packed.codes.to(torch.int8), packed.scales, 40),
        (packed.codes[0], packed.scales, 40),
    ):
        with pytest.raises(ValueError, match="not a packed matrix of"):
            check_packed(*wrong)
