"""A small real run for the tests: bytes of made-up text, a two-block model with dropout.

Also a program, so that runs can be killed: ``python toy.py DATA OUTPUT STEPS [--resume] [--kill-at STEP]``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openxlstm.checkpoint import byte_tokenizer
from openxlstm.data import PackedLoader, TokenDataset, prepare
from openxlstm.data.sources import Texts
from openxlstm.models import build_model
from openxlstm.training import Trainer, TrainerConfig, TrainingInterrupted

CONTEXT = 16
MODEL = {
    "model_type": "xlstm_lm",
    "vocab_size": 257,
    "embedding_dim": 16,
    "num_blocks": 2,
    "slstm_at": [1],
    "dropout": 0.1,
    "mlstm_block": {"mlstm": {"num_heads": 2}},
    "slstm_block": {"slstm": {"num_heads": 2}},
}


def prepare_data(directory: Path) -> None:
    texts = [f"document {n} has {n * n} words, " * (1 + n % 3) for n in range(40)]
    prepare(Texts(texts), directory, byte_tokenizer(), validation_fraction=0.2, progress=False, workers=1)


def make_trainer(
    data: Path,
    output: Path,
    *,
    model: nn.Module | None = None,
    sample: Callable[[nn.Module, int], list[str]] | None = None,
    **settings: Any,
) -> Trainer:
    defaults: dict[str, Any] = {
        "steps": 20, "batch_size": 4, "checkpoint_every": 10, "validation_every": 5, "validation_batches": 2,
        "sample_every": 1, "learning_rate": 1e-2, "tensorboard": False, "progress": False, "device": "cpu",
        "precision": "float32",
    }  # fmt: skip
    config = TrainerConfig(**{**defaults, **settings, "output": output})
    loaders = [
        PackedLoader(TokenDataset.open(data, split), batch_size=config.batch_size, context_length=CONTEXT,
                     seed=config.seed, order=order, prefetch=0)
        for split, order in (("train", "shuffled"), ("validation", "sequential"))
    ]  # fmt: skip
    if model is None:
        torch.manual_seed(3)
        model = build_model(MODEL)
    return Trainer(model, config, loaders[0], loaders[1], byte_tokenizer(), sample)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=-1)
    options = parser.parse_args()

    def sample(_: nn.Module, step: int) -> list[str]:
        if step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return [f"{float(torch.rand(())):.6f}"]

    trainer = make_trainer(options.data, options.output, steps=options.steps, sample=sample)
    try:
        trainer.fit(resume=options.resume)
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
