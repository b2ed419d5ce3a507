"""Native products of matrices: the definition in float64, bits that depend on nothing else, derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openxlstm.ops.matmul import matmul
from openxlstm.ops.native import loader

SIZES = [(1, 1, 1), (12, 32, 16), (13, 33, 17), (70, 100, 5), (5, 7, 400), (400, 90, 391), (30, 1100, 800)]


def operand(rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "rows":
        return torch.randn(rows, columns)
    if layout == "columns":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, 2 * columns)[:, ::2]  # neither


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition(isa, rel_error, size):
    torch.manual_seed(0)
    m, n, k = size
    for left in ("rows", "columns", "apart"):
        for right in ("rows", "columns", "apart"):
            a, b, bias = operand(m, k, left), operand(k, n, right), torch.randn(n)
            exact = a.double() @ b.double()
            assert rel_error(matmul(a, b, backend="native"), exact) < 1e-6
            assert rel_error(matmul(a, b, bias, backend="native"), exact + bias.double()) < 1e-6


@given(*(st.integers(0, 70) for _ in range(3)), st.booleans(), st.booleans(), st.integers(0, 5))
def test_any_size(m, n, k, a_in_rows, b_in_rows, border):
    if (reason := loader.unavailable()) is not None:
        pytest.skip(reason)
    a = operand(m + border, k, "rows" if a_in_rows else "columns")[border:]  # does not begin at its memory
    b = operand(k, n + border, "rows" if b_in_rows else "columns")[:, border:]
    torch.testing.assert_close(
        matmul(a, b, backend="native").double(), a.double() @ b.double(), atol=1e-4, rtol=0
    )


def test_bits_depend_on_neither_the_other_rows_nor_threads(isa, threads):
    torch.manual_seed(0)
    a, b = torch.randn(500, 410), torch.randn(90, 410).t()
    threads(1)
    expected = matmul(a, b, backend="native")
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(matmul(a, b, backend="native"), expected)
        for rows, columns in ((slice(3, 7), slice(0, 90)), (slice(100, 500), slice(33, 80))):
            part = matmul(a[rows], b[:, columns], backend="native")
            assert torch.equal(part, expected[rows, columns])


def test_nothing_but_numbers_of_this_row_and_column_counts(isa):
    a, b = torch.ones(30, 50), torch.ones(50, 40)
    a[7, 3], b[49, 39] = torch.nan, torch.inf
    c = matmul(a, b, backend="native")
    assert c[7].isnan().all()
    others = [row for row in range(30) if row != 7]
    assert c[others, 39].isinf().all()
    assert (c[others, :39] == 50).all()


def test_derivatives_of_any_order(native, rel_error):
    torch.manual_seed(0)
    shapes = ((20, 7), (7, 9), (9,))
    results = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "portable")):
        torch.manual_seed(1)
        a, b, bias = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
        y = matmul(a, b, bias, backend=backend).tanh().sum()
        first = torch.autograd.grad(y, (a, b, bias), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b, bias))
        results.append((*first, *second))
    for actual, exact in zip(*results, strict=True):
        assert rel_error(actual, exact) < 1e-5


def test_gradients_only_where_asked(native):
    a, b = torch.randn(20, 7), torch.randn(7, 9, requires_grad=True)
    matmul(a, b, backend="native").sum().backward()
    assert a.grad is None
    torch.testing.assert_close(b.grad, a.sum(0)[:, None].expand(7, 9))


def test_opcheck_and_compile(native):
    a, b = torch.randn(20, 7, requires_grad=True), torch.randn(7, 9, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    for arguments in ((a, b, None), (a, b, bias)):
        torch.library.opcheck(torch.ops.openxlstm.matmul.default, arguments)
    compiled = torch.compile(
        lambda *x: matmul(*x, backend="native"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    torch.testing.assert_close(compiled(a, b, bias), a @ b + bias)
