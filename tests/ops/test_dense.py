"""bfloat16 linear maps: the same numbers with and without bfloat16 units."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from openxlstm.ops import linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("units", [False, True])
def test_bfloat16(units, autocast, bias, rel_error, monkeypatch):
    monkeypatch.setattr("openxlstm.ops.dense.has_fast_bfloat16", lambda _: units)
    stored = torch.float32 if autocast else torch.bfloat16
    x = torch.randn(2, 5, 12).to(stored).requires_grad_()
    weight = torch.randn(7, 12).to(stored).requires_grad_()
    b = torch.randn(7).to(stored).requires_grad_() if bias else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(x, weight, b)
    assert y.dtype == torch.bfloat16
    rounded = [None if t is None else t.detach().bfloat16().double().requires_grad_() for t in (x, weight, b)]
    expected = functional.linear(*rounded)
    assert rel_error(y, expected) < 4e-3
    grad = torch.randn_like(expected).bfloat16()
    y.backward(grad)
    expected.backward(grad.double())
    for actual, wanted in zip((x, weight, b), rounded, strict=True):
        if actual is not None:
            assert actual.grad.dtype == actual.dtype
            assert rel_error(actual.grad, wanted.grad) < 4e-3


def test_other_dtypes_are_pytorchs():
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((3, 4), (5, 4), (5,)))
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))


def test_rows_do_not_depend_on_a_leading_shape():
    x, weight = torch.randn(6, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    torch.testing.assert_close(linear(x, weight).view(2, 3, 5), linear(x.view(2, 3, 4), weight))
    assert linear(x[:0], weight).shape == (0, 5)
    one = x[0].clone().requires_grad_()
    linear(one, weight).sum().backward()
    assert one.grad.shape == (4,)


def test_opcheck_and_compile():
    x, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.openxlstm.linear_bfloat16.default, (x, weight, None))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), linear(x, weight))
