"""What a checkpoint of a run holds, and whether it may be continued with the settings at hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from openxlstm.config import config_to_dict
from openxlstm.models import model_type_of
from openxlstm.training.checkpointing import Checkpoint, CheckpointStore
from openxlstm.training.config import TrainerConfig
from openxlstm.training.logging import read_log

FIXED = ("batch_size", "seed")
"""Settings that decide which tokens a step sees; a resumed run must keep them."""
UNREMARKABLE = ("output", "device", "progress", "tensorboard")
"""Settings whose change is not worth a line in the log."""


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The model's type and configuration as JSON holds them; of a registered model, its ``config.json``."""
    config = getattr(model, "config", None)
    values = config_to_dict(config) if dataclasses.is_dataclass(config) else {}
    try:
        kind = {"model_type": model_type_of(model)}  # pyright: ignore[reportArgumentType]
    except ValueError:
        kind = {"class": type(model).__name__}
    return json.loads(json.dumps({**kind, **values}))


def refuse_existing_run(output: Path, resume_hint: str) -> None:
    """Make sure that a new run in ``output`` overwrites no other.

    Raises:
        FileExistsError: there are checkpoints, a trained model, or a log with training steps.
    """
    checkpoints = CheckpointStore(output / "checkpoints").paths()
    if checkpoints:
        raise FileExistsError(
            f"'{output}' already holds a run, up to checkpoint '{checkpoints[-1].name}': "
            f"{resume_hint}, or choose another output directory"
        )
    log = output / "log.jsonl"
    logged = log.exists() and any(record.get("kind") == "train" for record in read_log(log))
    if logged or (output / "model").exists():
        raise FileExistsError(
            f"'{output}' already holds the {'log' if logged else 'model'} of a run without checkpoints: "
            "choose another output directory, or move it away"
        )


def check_continuation(checkpoint: Checkpoint, model: nn.Module, config: TrainerConfig) -> dict[str, Any]:
    """Refuse settings with which the run would not be continued but mangled.

    Returns:
        the training settings that differ, ``{name: [before, now]}``.

    Raises:
        ValueError: another model, another batch size or seed, or fewer steps than are done.
    """
    where = f"checkpoint '{checkpoint.path}'"
    for name, (before, now) in _differences(checkpoint.state["model"], describe_model(model)).items():
        raise ValueError(
            f"{where} belongs to another model: {name} is {before!r} there and {now!r} here. "
            "Resume with the model of the run, or choose another output directory"
        )
    if checkpoint.step > config.steps:
        raise ValueError(
            f"{where} has more than the {config.steps} steps asked for; raise steps to train further"
        )
    changed = _differences(checkpoint.state["train"], config_to_dict(config))
    for name in FIXED:
        if name in changed:
            before, now = changed[name]
            raise ValueError(
                f"{name} must stay {before} when resuming {where}, got {now}: "
                "it decides which tokens a step sees"
            )
    return {name: values for name, values in changed.items() if name not in UNREMARKABLE}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Fields with two values. Fields that only one side knows are another version's and do not count."""
    pairs = {name: [value, now[name]] for name, value in before.items() if name in now}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
