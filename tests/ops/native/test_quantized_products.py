"""quantized_linear: native equals the definition, bits, gradients, devices, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.ops import explain, quantized_linear
from openxlstm.ops.native import loader
from openxlstm.ops.products import multiply
from openxlstm.ops.quantization import dequantize, quantize, round_activations
from openxlstm.ops.quantization.native import packed_weight

SCHEMES = [(8, 32), (4, 32), (4, 64)]
SIZES = [(1, 1), (5, 7), (17, 32), (70, 33), (64, 192), (33, 515), (19, 4200)]  # (out, in)


def packed_matrix(rows, columns, bits, group) -> Any:
    return quantize(torch.randn(rows, columns), bits, group=group, method="plain")


def definition(x, packed: Any, bits=16):
    return round_activations(x, bits).double() @ dequantize(*packed, x.shape[-1]).double().T


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_equals_the_definition(isa, rel_error, size, bits, group):
    packed = packed_matrix(*size, bits, group)
    for batch in (0, 1, 2, 3, 8, 9, 13):
        x = torch.randn(batch, size[1]) * 10.0 ** torch.randint(-8, 8, (batch, 1))
        for activation_bits in (16, 8):
            y = quantized_linear(x, *packed, activation_bits=activation_bits, backend="native")
            assert y.shape == (batch, size[0])
            for row in range(batch):
                assert rel_error(y[row], definition(x[row], packed, activation_bits)) < 2e-6
        rows = multiply(packed_weight(*packed, size[1]), x)  # the entry of the decode engine
        for row in range(batch):
            assert rel_error(rows[row], definition(x[row], packed)) < 2e-6


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_largest_sums_do_not_overflow(isa, rel_error, bits, group):
    for columns in (512, 4096, 5000):
        packed = quantize(torch.full((20, columns), -1.0), bits, group=group, method="plain")
        for batch in (1, 12):
            x = torch.full((batch, columns), -3.0)
            assert rel_error(quantized_linear(x, *packed, backend="native"), definition(x, packed)) < 5e-6


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
def test_bits_depend_on_neither_batch_nor_threads(isa, threads, bits, group):
    packed = packed_matrix(203, 4130, bits, group)
    weight, x = packed_weight(*packed, 4130), torch.randn(19, 4130)
    threads(1)
    single = torch.cat([multiply(weight, row[None]) for row in x])
    many = quantized_linear(x, *packed, backend="native")
    for count in (1, 2, 3):
        threads(count)
        for batch in (1, 2, 3, 7, 8, 9, 19):
            assert torch.equal(multiply(weight, x[:batch]), single[:batch])
            assert torch.equal(multiply(weight, x[-batch:]), single[-batch:])
            if batch <= 8:
                assert torch.equal(quantized_linear(x[-batch:], *packed, backend="native"), single[-batch:])
        assert torch.equal(quantized_linear(x, *packed, backend="native"), many)
        assert torch.equal(quantized_linear(x[:9], *packed, backend="native"), many[:9])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 300), st.integers(1, 20), st.sampled_from(SCHEMES),
    st.sampled_from([16, 8]), st.integers(0, 99),
)  # fmt: skip
def test_any_size(rows, columns, batch, scheme, activation_bits, seed):
    if loader.unavailable():
        pytest.skip("no native library")
    torch.manual_seed(seed)
    packed = packed_matrix(rows, columns, *scheme)
    x = torch.randn(2, batch, columns)[:, :, torch.randperm(columns)]
    y = quantized_linear(x, *packed, activation_bits=activation_bits, backend="native")
    expected = quantized_linear(x, *packed, activation_bits=activation_bits, backend="portable")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_accuracy_of_the_rounding(rel_error):
    """16 bits are fifty times finer than bfloat16, even beside an outlier; 8 bits are coarser than it."""
    x = torch.randn(64, 1024)
    assert rel_error(round_activations(x, 16), x) < 5e-5 < rel_error(x.bfloat16(), x) / 30
    assert 5e-3 < rel_error(round_activations(x, 8), x) < 2e-2
    x[:, 3] = 100
    assert rel_error(round_activations(x, 16), x) < 5e-4


@pytest.mark.parametrize(("bits", "group"), SCHEMES)
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_bfloat16_vectors_are_read_and_written_in_place(isa, bits, group, activation_bits):
    """The same numbers as through float32, rounded once."""
    for rows, columns, batch in ((70, 33, 5), (33, 130, 12), (97, 64, 31)):
        packed = packed_matrix(rows, columns, bits, group)
        x = torch.randn(batch, columns).bfloat16()
        y = quantized_linear(x, *packed, activation_bits=activation_bits, backend="native")
        wide = quantized_linear(x.float(), *packed, activation_bits=activation_bits, backend="native")
        assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_unusual_activations(backend, isa):
    packed = packed_matrix(9, 40, 4, 32)
    for rows in (5, 12):
        x = torch.randn(rows, 40)
        x[0], x[1, 5], x[2, 7], x[3], x[4] = 0, torch.nan, -torch.inf, 1e-38, 3e38
        y = quantized_linear(x, *packed, backend=backend)
        assert (y[[0, 3]] == 0).all()
        assert y[[1, 2]].isnan().all()
        assert not y[[0, *range(5, rows)]].isnan().any()
        assert torch.equal(y[5:], quantized_linear(x, *packed, backend=backend)[5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_dtypes_bias_and_autocast(rel_error, dtype, bits):
    packed, bias = packed_matrix(24, 96, bits, 32), torch.randn(24)
    x = torch.randn(2, 5, 96).to(dtype)
    y = quantized_linear(x, *packed, bias)
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
    assert rel_error(y, definition(x, packed) + bias.double()) < tolerance
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            for backend in ("auto", "portable"):
                assert quantized_linear(x, *packed, bias, backend=backend).dtype == torch.bfloat16


def test_gradient_with_respect_to_x(rel_error):
    packed, x = packed_matrix(24, 96, 4, 32), torch.randn(3, 96, requires_grad=True)
    weights = torch.randn(3, 24)
    (gradient,) = torch.autograd.grad((quantized_linear(x, *packed) * weights).sum(), x)
    assert rel_error(gradient, weights @ dequantize(*packed, 96)) < 1e-6
    with pytest.raises(ValueError, match=r"'native' of quantized_linear cannot serve.*has no backward pass"):
        quantized_linear(x, *packed, backend="native")


def test_without_a_library_pytorch_does_the_work(monkeypatch):
    packed, x = packed_matrix(9, 40, 4, 32), torch.randn(3, 40)
    expected = quantized_linear(x, *packed, backend="portable")
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    assert "quantized_linear/native: cannot: turned off" in explain("quantized_linear")
    assert "quantized_linear/portable: chosen by 'auto'" in explain("quantized_linear")
    assert torch.equal(quantized_linear(x, *packed), expected)


def test_what_it_refuses(native):
    packed = packed_matrix(9, 40, 4, 32)
    assert "native: cannot: runs on CPUs" in explain("quantized_linear", device="cuda")
    assert "native: cannot: computes in float32" in explain("quantized_linear", dtype=torch.float64)
    with pytest.raises(ValueError, match="not a packed matrix of 70 inputs"):
        quantized_linear(torch.ones(2, 70), *packed)
    with pytest.raises(ValueError, match="activation_bits must be 16 or 8, got 4"):
        quantized_linear(torch.ones(2, 40), *packed, activation_bits=4)
    with pytest.raises(ValueError, match="x must be floating point vectors"):
        quantized_linear(torch.ones(2, 40, dtype=torch.int64), *packed)
    with pytest.raises(ValueError, match="must be contiguous and on the CPU"):
        packed_weight(packed.codes[::2], packed.scales[::2], 40)


def test_opcheck_and_compile(native):
    x = torch.randn(3, 40)
    for bits in (8, 4):
        packed = packed_matrix(9, 40, bits, 32)
        utilities = ("test_schema", "test_faketensor")
        operator = torch.ops.openxlstm.quantized_linear_native.default
        torch.library.opcheck(operator, (x, *packed, 16), test_utils=utilities)
        compiled = torch.compile(
            lambda x, c, s: quantized_linear(x, c, s), backend="aot_eager", fullgraph=True
        )
        with torch.no_grad():
            assert torch.equal(compiled(x, *packed), quantized_linear(x, *packed))
