"""Loss sums, bits per byte, speed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from openxlstm.models import build_model
from openxlstm.ops.matmul import matmul
from openxlstm.training import metrics
from openxlstm.training.metrics import (
    Speedometer,
    bits_per_byte,
    in_bits_per_byte,
    speedometer,
    summed_cross_entropy,
)


def test_sum_over_the_targets_that_count() -> None:
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    targets[0, :3] = -100
    expected = sum(
        -F.log_softmax(logits[b, t], -1)[targets[b, t]]
        for b in range(2)
        for t in range(5)
        if targets[b, t] != -100
    )
    assert torch.allclose(summed_cross_entropy(logits, targets), torch.as_tensor(expected), rtol=1e-12)
    assert summed_cross_entropy(logits, torch.full_like(targets, -100)) == 0
    assert summed_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(2) * 3, 4.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="bytes_per_token must be positive"):
        bits_per_byte(1.0, 0.0)
    assert in_bits_per_byte(1.0, object()) == {}


def test_speed() -> None:
    meter = Speedometer(flops_per_token=1e6, peak_flops=1e9)
    assert meter.read() == {"tokens_per_second": 0.0, "utilisation": 0.0}
    meter.add(100, 0.5)
    meter.add(100, 0.5)
    assert meter.read() == {"tokens_per_second": 200.0, "utilisation": pytest.approx(0.2)}
    assert meter.read()["tokens_per_second"] == 0.0
    assert Speedometer().read() == {"tokens_per_second": 0.0}


def test_speed_bound_of_a_model() -> None:
    fields = {"model_type": "xlstm_large", "num_heads": 2, "embedding_dim": 16, "num_blocks": 2}
    model = build_model({**fields, "vocab_size": 11})
    meter = speedometer(model, 64, None, torch.device("cpu"))
    assert meter.flops_per_token is not None
    assert meter.peak_flops is not None
    assert speedometer(torch.nn.Linear(2, 2), 64, None, torch.device("cpu")).flops_per_token is None


@pytest.mark.parametrize(("fast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_bound_is_of_the_dtype_that_runs(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    def measure(dtype: torch.dtype, _: torch.device, *, product: object) -> float:
        assert product is matmul
        measured.append(dtype)
        raise RuntimeError("no such product")

    measured: list[torch.dtype] = []
    monkeypatch.setattr(metrics, "has_fast_bfloat16", lambda _: fast)
    monkeypatch.setattr(metrics, "measure_peak_flops", measure)
    fields = {"model_type": "xlstm_large", "num_heads": 2, "embedding_dim": 16, "num_blocks": 2}
    model = build_model({**fields, "vocab_size": 11})
    meter = speedometer(model, 64, torch.bfloat16, torch.device("cpu"))
    assert measured == [dtype]
    assert meter.peak_flops is None
