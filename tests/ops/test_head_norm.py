"""The norm of heads with skip path and gate: every backend against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openxlstm.ops import explain, head_norm
from openxlstm.ops.native import loader

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # older interpreters
FORMS = {
    "bare": {},
    "large": {"weight": True, "gate": True},
    "large with bias": {"weight": True, "bias": True, "gate": True},
    "block stack": {
        "weight": True, "weight_offset": 1.0, "skip": True, "skip_weight": True, "gate": True,
        "activation": "silu", "widen": False,
    },
    "plain skip": {"skip": True},
    "root mean square": {"weight": True, "center": False},
}  # fmt: skip


def problem(form: str, device: Any, dtype: torch.dtype = torch.float32, shape=(2, 3, 4, 21)) -> dict:
    """x and the options of a form; gate and skip are columns of a wider block, as in the layers."""
    *rows, heads, d = shape
    width = heads * d
    wide = torch.randn(*rows, 3 * width, device=device).to(dtype)
    vectors = torch.randn(3, width, device=device).to(dtype)
    tensors = {
        "weight": vectors[0], "bias": vectors[1], "skip_weight": vectors[2],
        "gate": wide[..., width : 2 * width], "skip": wide[..., 2 * width :],
    }  # fmt: skip
    options = {n: tensors[n] if v is True and n in tensors else v for n, v in FORMS[form].items()}
    return {"x": (wide[..., :width] * 3 + 1).unflatten(-1, (heads, d)), "eps": 1e-5, **options}


def formula(x: Tensor, eps: float, center: bool = True, weight_offset: float = 0.0, **options: Any) -> Tensor:
    x, tensors = x.double(), {n: t.double() for n, t in options.items() if isinstance(t, Tensor)}
    if center:
        x = x - x.mean(-1, keepdim=True)
    y = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    y = y * (tensors["weight"] + weight_offset if "weight" in tensors else 1)
    y = y + tensors.get("bias", 0) + tensors.get("skip_weight", 1) * tensors.get("skip", 0)
    if "gate" in tensors:
        gate = tensors["gate"]
        y = y * gate.sigmoid() * (gate if options.get("activation") == "silu" else 1)
    return y


@pytest.fixture(params=["portable", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend; skips those that are not installed."""
    if request.param == "native" and (reason := loader.unavailable()) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def place(backend: str, request: pytest.FixtureRequest) -> torch.device:
    """Where the backend runs."""
    return request.getfixturevalue("device") if backend == "triton" else torch.device("cpu")


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formula(form, backend, place, rel_error):
    given = problem(form, place)
    y = head_norm(**given, backend=backend)
    assert y.dtype == torch.float32
    assert rel_error(y, formula(**given)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["large", "block stack", "root mean square"])
def test_half_precision_is_no_worse_than_pytorch(form, dtype, device, rel_error):
    """One rounding at the end instead of one per operation."""
    given = problem(form, device, dtype)
    exact = formula(**given)
    y, plain = (head_norm(**given, backend=b) for b in ("triton", "portable"))
    assert y.dtype == plain.dtype == dtype
    assert rel_error(y, exact) <= rel_error(plain, exact)


def test_mixed_dtypes_give_what_pytorch_gives(device, rel_error):
    """Under autocast activations are bfloat16 and parameters float32."""
    given = problem("large", device)
    given |= {"x": given["x"].bfloat16(), "gate": given["gate"].bfloat16()}
    y, plain = (head_norm(**given, backend=b) for b in ("triton", "portable"))
    assert y.dtype == plain.dtype == torch.float32
    assert rel_error(y, formula(**given)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (5, 1, 300), (0, 2, 8), (2, 3, 1)])
def test_any_shape(shape, backend, place, rel_error):
    given = problem("large", place, shape=shape)
    y = head_norm(**given, backend=backend)
    assert y.shape == (*shape[:-2], shape[-2] * shape[-1])
    assert rel_error(y, formula(**given)) < 1e-5


def test_strides(device):
    given = problem("bare", device, shape=(2, 3, 4, 8))
    x = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inner = given["x"].mT.contiguous().mT
    expected = head_norm(given["x"], backend="triton")
    assert torch.equal(head_norm(x, backend="triton"), expected)
    assert torch.equal(head_norm(inner, backend="triton"), expected)


def test_gradients_of_the_portable_backend():
    given = {n: t.double() if isinstance(t, Tensor) else t for n, t in problem("block stack", "cpu").items()}
    names = [n for n, t in given.items() if isinstance(t, Tensor)]
    leaves = [given[n][..., :1, :5] if n == "x" else given[n][..., :5] for n in names]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    options = {n: v for n, v in given.items() if n not in names}
    assert torch.autograd.gradcheck(
        lambda *t: head_norm(**dict(zip(names, t, strict=True)), **options), leaves
    )


def test_choice_and_refusals(device, monkeypatch):
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    assert "head_norm/triton: chosen by 'auto'" in explain("head_norm", device="cuda")
    assert "has no backward pass" in explain("head_norm", device="cuda", needs_grad=True)
    assert "head_norm/portable: chosen by 'auto'" in explain("head_norm")
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="has no backward pass"):
        head_norm(x.requires_grad_(), backend="triton")
    with pytest.raises(ValueError, match="not float64"):
        head_norm(x.detach().double(), backend="triton")
    with pytest.raises(ValueError, match="up to 16384 channels at once, got 16385"):
        head_norm(torch.zeros(1, 1, 16385), backend="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must have shape \(12,\), got \(4,\)"),
        ({"gate": torch.zeros(2, 4)}, r"gate must have shape \(2, 12\), got \(2, 4\)"),
        ({"skip_weight": torch.zeros(12)}, "skip_weight scales skip, which was not given"),
        ({"activation": "relu"}, "activation must be 'sigmoid' or 'silu', got 'relu'"),
        ({"backend": "trito"}, "unknown backend 'trito'"),
        ({"bias": torch.zeros(12, device="meta")}, "bias is on meta, x on cpu"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        head_norm(torch.zeros(2, 3, 4), **options)
    with pytest.raises(ValueError, match=r"x must be floating point of shape \(\.\.\., H, D\)"):
        head_norm(torch.zeros(3))


def test_opcheck_and_compile(device):
    given = problem("block stack", device)
    arguments = (
        given["x"], given["weight"], None, 1.0, True, 1e-5, given["gate"], True, given["skip"],
        given["skip_weight"],
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.openxlstm.head_norm_triton.default, arguments, test_utils=tests)
    compiled = torch.compile(head_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, backend="triton"), head_norm(**given, backend="triton"))
