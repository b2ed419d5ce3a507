"""Cross-entropy of a linear map: against the definition in float64, for every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openxlstm.ops import linear_cross_entropy
from openxlstm.ops.cross_entropy import IGNORED, api
from openxlstm.ops.native import build, loader

BACKENDS = ("portable", "native")
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and loader.unavailable():
        pytest.skip(f"native kernels: {loader.unavailable()}")
    return request.param


def inputs(dtype: torch.dtype, rows: int = 51, vocabulary: int = 1009) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, 24), (vocabulary, 24), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[:5] = IGNORED
    return x, weight, bias, targets


def definition(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    z = x @ weight.t() + bias
    z = z if cap is None else cap * torch.tanh(z / cap)
    return F.cross_entropy(z, targets, reduction="sum")


def errors(dtype: torch.dtype, cap: float | None, backend: str, **sizes: int) -> list[float]:
    """Relative errors of the loss and of the three gradients."""
    *numbers, targets = inputs(dtype, **sizes)
    x, weight, bias = numbers
    loss = linear_cross_entropy(x, weight, targets, bias, soft_cap=cap, backend=backend)
    ours = (loss.detach(), *torch.autograd.grad(0.5 * loss, numbers))
    exact = [p.detach().double().requires_grad_() for p in numbers]
    wanted = definition(exact[0], exact[1], exact[2], targets, cap)
    theirs = (wanted.detach(), *torch.autograd.grad(0.5 * wanted, exact))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", LIMITS)
def test_values_and_gradients(dtype: torch.dtype, cap: float | None, backend: str) -> None:
    if dtype == torch.float64 and backend == "native":
        with pytest.raises(ValueError, match="not float64"):
            errors(dtype, cap, backend)
        return
    assert max(errors(dtype, cap, backend)) < LIMITS[dtype]


@pytest.mark.parametrize("isa", sorted(build.instruction_sets()))
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in loader.status().isas:
        pytest.skip(f"this machine does not have {isa}")
    monkeypatch.setenv("OPENXLSTM_ISA", isa)
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary in (2, 3, 16, 33, 1030):  # around whole vectors
            for cap in (None, 3.0):
                *found, _ = errors(dtype, cap, "native", vocabulary=vocabulary)
                assert max(found) < LIMITS[dtype]  # few tokens: the bias's gradient is a difference of sums


def test_parts_do_not_change_the_result(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = errors(torch.float32, 5.0, backend)
    monkeypatch.setattr(api, "LOGITS", 1)  # a row at a time
    monkeypatch.setattr(api, "GRADIENT_BLOCK", 1)
    assert max(errors(torch.float32, 5.0, backend)) < LIMITS[torch.float32]
    assert max(whole) < LIMITS[torch.float32]


def test_extremes(backend: str) -> None:
    """One number far above the others gives a loss of zero or of the distance, never infinity."""
    x = torch.tensor([[1.0], [1.0], [-3e4]], requires_grad=True)
    weight = torch.tensor([[3e4], [0.0], [-3e4]], requires_grad=True)
    losses = [linear_cross_entropy(x[:1], weight, torch.tensor([t]), backend=backend) for t in range(3)]
    assert [loss.item() for loss in losses] == [0.0, 3e4, 6e4]
    (gradient,) = torch.autograd.grad(losses[1], weight)
    assert gradient.flatten().tolist() == [1.0, -1.0, 0.0]
    x = torch.tensor([[float("nan")]])
    assert linear_cross_entropy(x, weight, torch.tensor([0]), backend=backend).isnan()


def test_nothing_to_count(backend: str) -> None:
    x, weight, _, targets = inputs(torch.float32)
    for rows in (0, 4):
        loss = linear_cross_entropy(x[:rows], weight, targets[:rows], backend=backend)
        assert loss == 0
        assert loss.dtype == torch.float32
        assert all(not g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_same_bits_every_time_and_without_gradients(backend: str) -> None:
    x, weight, bias, targets = inputs(torch.float32)
    runs = [linear_cross_entropy(x, weight, targets, bias, soft_cap=5.0, backend=backend) for _ in range(3)]
    with torch.no_grad():
        runs.append(linear_cross_entropy(x, weight, targets, bias, soft_cap=5.0, backend=backend))
    assert len({run.item() for run in runs}) == 1


def test_autocast_equals_the_cross_entropy_of_rounded_logits(backend: str) -> None:
    x, weight, bias, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, bias, backend=backend)
        logits = F.linear(x, weight, bias)
    assert torch.allclose(loss, F.cross_entropy(logits.float(), targets, reduction="sum"), rtol=2e-3)
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_is_a_proper_operator_and_compiles() -> None:
    x, weight, bias, targets = inputs(torch.float32)
    torch.library.opcheck(api._linear_cross_entropy, (x, weight, targets, bias, 3.0, True, "portable"))

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, soft_cap=3.0) * 0.3

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, weight), (x, weight))
    theirs = torch.autograd.grad(scaled(x, weight), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_second_derivative_is_refused() -> None:
    x, weight, _, targets = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, create_graph=True)
    loss = linear_cross_entropy(x, weight, targets)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(51, 23)}, r"weight \(V, E\), got torch.float32 \(51, 23\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(1009,\)"),
        ({"soft_cap": 0.0}, "soft_cap must be a positive number or None, got 0.0"),
        ({"targets": torch.zeros(50, dtype=torch.int64)}, r"targets must be int64 of shape \(51,\)"),
        ({"targets": torch.full((51,), 1009)}, "target 1009 is out of range: tokens are 0 to 1008"),
        ({"targets": torch.full((51,), -1)}, "target -1 is out of range"),
        ({"backend": "nativ"}, "Did you mean 'native'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x, weight, bias, targets = inputs(torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
