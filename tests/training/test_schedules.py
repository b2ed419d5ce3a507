"""Schedules: exact values at the joints, the published 7B course, continuity."""

from __future__ import annotations

import math
from typing import Any

import pytest

from openxlstm.training import TrainerConfig, learning_rate, schedule_factor

CASES: list[dict[str, Any]] = [
    {"schedule": schedule, "steps": steps, "warmup": warmup, "cooldown": cooldown, "final_factor": factor}
    for schedule in ("cosine", "exponential", "wsd", "constant")
    for steps, warmup, cooldown in ((100, 10, 20), (100, 0, 0), (100, 100, 0), (100, 0, 100), (1, 0, 0))
    for factor in (0.1, 1.0)
]


def test_cosine() -> None:
    values = [
        schedule_factor(n, schedule="cosine", steps=110, warmup=10, final_factor=0.1) for n in range(110)
    ]
    assert values[:10] == [(n + 1) / 10 for n in range(10)]
    assert values[10] == 1.0
    assert values[60] == pytest.approx(0.55)
    assert values[85] == pytest.approx(0.1 + 0.9 * 0.5 * (1 - math.sqrt(0.5)))
    assert values[109] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))


def test_exponential_is_the_published_course() -> None:
    """xLSTM 7B: warm-up 3,000, decay to a tenth over 495,000, linear cool-down to zero over 2,000."""
    course = {
        "schedule": "exponential",
        "steps": 500_000,
        "warmup": 3000,
        "cooldown": 2000,
        "final_factor": 0.1,
    }
    assert schedule_factor(2999, **course) == 1.0  # pyright: ignore[reportArgumentType]
    assert schedule_factor(3000, **course) == 1.0  # pyright: ignore[reportArgumentType]
    assert schedule_factor(250_500, **course) == pytest.approx(math.sqrt(0.1))  # pyright: ignore
    assert schedule_factor(498_000, **course) == pytest.approx(0.1)  # pyright: ignore
    assert schedule_factor(499_000, **course) == pytest.approx(0.05)  # pyright: ignore
    assert schedule_factor(499_999, **course) == pytest.approx(0.1 / 2000)  # pyright: ignore
    second = {**course, "steps": 550_000, "cooldown": 7000, "final_factor": 0.0811}
    assert schedule_factor(497_500, **course) == pytest.approx(  # pyright: ignore
        schedule_factor(497_500, **second),  # pyright: ignore[reportArgumentType]
        rel=1e-3,
    )


def test_wsd_stays_and_then_falls_to_the_final_factor() -> None:
    values = [
        schedule_factor(n, schedule="wsd", steps=100, warmup=10, cooldown=20, final_factor=0.1)
        for n in range(100)
    ]
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.55)
    assert values[99] == pytest.approx(0.1 + 0.9 / 20)


def test_constant() -> None:
    values = [schedule_factor(n, schedule="constant", steps=30, warmup=10, cooldown=10) for n in range(30)]
    assert values[9:21] == [1.0] * 12
    assert values[25] == pytest.approx(0.5)


@pytest.mark.parametrize("case", CASES)
def test_positive_bounded_and_without_jumps(case: dict[str, Any]) -> None:
    values = [schedule_factor(n, **case) for n in range(case["steps"])]
    assert all(0 < value <= 1 for value in values)
    limit = max(1 / max(case["warmup"], 1), 1 / max(case["cooldown"], 1), 0.05)
    ends = [n for n in (case["warmup"], case["steps"] - case["cooldown"]) if 0 < n < case["steps"]]
    assert all(abs(values[n] - values[n - 1]) <= limit + 1e-12 for n in ends)
    assert schedule_factor(case["steps"] + 50, **case) == values[-1]


def test_learning_rate_scales_the_peak() -> None:
    config = TrainerConfig(steps=20, learning_rate=3e-3, warmup_steps=4)
    assert learning_rate(config, 0) == pytest.approx(3e-3 / 4)
    assert learning_rate(config, 4) == 3e-3
