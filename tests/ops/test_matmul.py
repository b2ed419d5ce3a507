"""Products of large matrices: shapes, choice of backend, derivatives, compiling."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops import dispatch, linear
from openxlstm.ops.matmul import matmul, native
from openxlstm.ops.native import loader


def request(dtype: torch.dtype = torch.float32, rows: int = 1000) -> dispatch.Request:
    return dispatch.Request(torch.device("cpu"), dtype, {"rows": rows})


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"\(M, K\) and \(K, N\) are needed, got \(2, 3\) and \(2, 3\)"):
        matmul(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"bias must be \(4,\) for these matrices, got \(3,\)"):
        matmul(torch.ones(2, 3), torch.ones(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="computes in float32, not bfloat16"):
        matmul(torch.ones(2, 3).bfloat16(), torch.ones(3, 4).bfloat16(), backend="native")
    with pytest.raises(ValueError, match="computes in float32, not float64"):
        matmul(torch.ones(2, 3).double(), torch.ones(3, 4).double(), backend="native")


@pytest.mark.parametrize(
    ("isa", "intel", "rows", "chosen"),
    [
        ("avx512_bf16", False, 64, "native"),
        ("avx512", False, 64, "native"),
        ("avx512", False, 63, "portable"),
        ("avx512", True, 64, "portable"),
        ("avx2", False, 64, "portable"),
    ],
)
def test_auto_takes_the_faster_one(isa, intel, rows, chosen, monkeypatch):
    have = loader.Status("shipped", "here", isa, (isa,), 2, None)
    monkeypatch.setattr(native.loader, "status", lambda: have)
    monkeypatch.setattr(native, "_is_intel", lambda: intel)
    assert dispatch.resolve("matmul", "auto", request(rows=rows)).name == chosen


def test_other_types_are_pytorchs():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert dispatch.resolve("matmul", "auto", request(dtype)).name == "portable"
        a, b = torch.randn(70, 4).to(dtype), torch.randn(4, 5).to(dtype)
        assert torch.equal(matmul(a, b), a @ b)


def test_a_linear_map_uses_it(monkeypatch, rel_error):
    have = loader.Status("shipped", "here", "avx512", ("avx512",), 2, None)
    monkeypatch.setattr(native.loader, "status", lambda: have)
    monkeypatch.setattr(native, "_is_intel", lambda: False)
    used = []
    monkeypatch.setitem(
        dispatch._TABLE,
        "matmul",
        [
            dispatch.Backend("native", lambda a, b, c: used.append(a.shape) or a @ b + c, 1, lambda _: None),
        ],
    )
    x, weight, bias = torch.randn(2, 40, 8), torch.randn(5, 8), torch.randn(5)
    y = linear(x, weight, bias)
    assert used == [(80, 8)]
    assert rel_error(y, torch.nn.functional.linear(x, weight, bias)) < 1e-6
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(70, 7), weight)
