"""Settings: defaults, round trip, and one clear sentence for each value that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openxlstm.config import config_from_dict, config_to_dict
from openxlstm.training import TrainerConfig


def test_round_trip() -> None:
    config = TrainerConfig(steps=7, betas=(0.8, 0.9), output=Path("a/b"), warmup_steps=2)
    assert config_from_dict(TrainerConfig, config_to_dict(config)) == config


def test_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'learning_rate'"):
        config_from_dict(TrainerConfig, {"learningrate": 1e-3})


def test_defaults_that_depend_on_the_run() -> None:
    assert (TrainerConfig(steps=50).warmup, TrainerConfig(steps=50).cooldown) == (5, 0)
    assert TrainerConfig(steps=100_000).warmup == 750
    assert TrainerConfig(steps=50, schedule="wsd").cooldown == 10
    assert TrainerConfig(steps=50, schedule="wsd", cooldown_steps=3).cooldown == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 2, "gradient_accumulation": 3}, "must not exceed batch_size"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"clip": float("inf")}, "clip must be 0 or more"),
        ({"final_factor": 2.0}, "final_factor must be between 0 and 1"),
        ({"schedule": "exponential", "final_factor": 0.0}, "above 0 for the exponential schedule"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"steps": 10, "warmup_steps": 8, "cooldown_steps": 3}, "do not fit into 10 steps"),
        ({"checkpoint_every": -5}, "checkpoint_every must be 0 or more"),
        ({"seed": -1}, "seed must be between"),
    ],
)
def test_impossible_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)
