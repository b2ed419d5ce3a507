"""The native norm of heads equals the portable definition in float64 under every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openxlstm.ops import explain, head_norm

FORMS: dict[str, dict[str, Any]] = {
    "bare": {},
    "large": {"weight": True, "bias": True, "gate": True},
    "block stack": {
        "weight": True, "weight_offset": 1.0, "skip": True, "skip_weight": True, "gate": True,
        "activation": "silu",
    },
    "plain skip": {"skip": True},
    "root mean square": {"weight": True, "center": False},
}  # fmt: skip
SHAPES = [(1, 1, 1, 16), (2, 33, 3, 21), (70, 4, 7), (1, 5, 1, 300), (3, 2, 1)]  # blocks of 32 positions
TENSORS = ("x", "weight", "bias", "gate", "skip", "skip_weight")


def problem(form: str, shape: tuple[int, ...]) -> dict[str, Any]:
    *rows, heads, d = shape
    width = heads * d
    tensors = {name: torch.randn(width) for name in ("weight", "bias", "skip_weight")}
    tensors |= {name: torch.randn(*rows, width) for name in ("gate", "skip")}
    options = {n: tensors[n] if v is True and n in tensors else v for n, v in FORMS[form].items()}
    return {"x": 3 * torch.randn(shape) + 1, "eps": 1e-5, **options}


def run(given: dict[str, Any], backend: str = "native") -> list[Tensor]:
    """Output, and the gradients of a random loss on it."""
    leaves = {n: given[n].detach().clone().requires_grad_() for n in TENSORS if n in given}
    y = head_norm(**(given | leaves), backend=backend)
    loss = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), loss)]


def cast(given: dict[str, Any], dtype: torch.dtype, names: tuple[str, ...] = TENSORS) -> dict[str, Any]:
    return {n: v.to(dtype) if n in names else v for n, v in given.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(isa, rel_error, form, shape):
    given = problem(form, shape)
    exact = run(cast(given, torch.float64), "portable")
    for a, e in zip(run(given), exact, strict=True):
        assert a.shape == e.shape
        scale = e.abs().max()  # the gradient of a head of one channel is nothing but rounding
        assert rel_error(a, e) < 2e-5 or (a - e).abs().max() < 2e-5 * max(1.0, scale)


@pytest.mark.parametrize("names", [TENSORS, ("x", "gate", "skip")], ids=["all", "activations"])
@pytest.mark.parametrize("form", ["large", "block stack", "root mean square"])
def test_bfloat16_is_no_worse_than_pytorch(isa, rel_error, form, names):
    given = cast(problem(form, (2, 33, 3, 40)), torch.bfloat16, names)
    exact = run(cast(given, torch.float64), "portable")
    for a, p, e in zip(run(given), run(given, "portable"), exact, strict=True):
        assert a.dtype == p.dtype
        assert rel_error(a, e) <= max(1.05 * rel_error(p, e), 4e-3)


def test_threads_do_not_change_anything(isa, threads):
    given, results = problem("block stack", (2, 99, 3, 21)), []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(given))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides_and_neighbours(native):
    """Views need no copy, and a row alone gives the bits it gives among others."""
    wide = torch.randn(4, 6, 3 * 24)
    x, gate = wide[..., :24].unflatten(-1, (3, 8)), wide[..., 24:48]
    y = head_norm(x, gate=gate, backend="native")
    assert torch.equal(y, head_norm(x.contiguous(), gate=gate.contiguous(), backend="native"))
    assert torch.equal(y[2:3, 4:5], head_norm(x[2:3, 4:5], gate=gate[2:3, 4:5], backend="native"))
    inner = x.mT.contiguous().mT
    assert torch.equal(y, head_norm(inner, gate=gate, backend="native"))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_and_compile(native, form):
    from openxlstm.ops.normalization import native as backend

    given = problem(form, (2, 5, 3, 8))
    tensors = [given.get(n) for n in ("x", "weight", "bias", "gate", "skip", "skip_weight")]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(backend._forward, (*tensors, 1e-5, form != "root mean square", False))


def test_numbers_that_are_none(isa):
    x = torch.randn(3, 2, 40)
    x[1, 1, 3] = float("nan")
    y = head_norm(x, gate=torch.full((3, 80), 200.0), backend="native")
    assert y[1, 40:].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert y[1, :40].isfinite().all()


def test_auto_chooses_it(native):
    assert "head_norm/native: chosen by 'auto'" in explain("head_norm", device=torch.device("cpu"))
