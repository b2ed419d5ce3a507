"""One trial: train a small network on a task from a seed, then measure its accuracy by length.

Strings are addressed by number, so the data of a step depends on the step alone and a trial that was
interrupted goes on from its checkpoint as if nothing had been. Accuracy is measured on strings never trained
on, with the state carried from piece to piece, so long strings take no more memory than short ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from openxlstm.config import config_to_dict
from openxlstm.evaluation.networks import count_parameters, get_network
from openxlstm.evaluation.tasks import Task, TaskBatch, get_task
from openxlstm.evaluation.text import summed_loss
from openxlstm.runtime import atomic_write_bytes
from openxlstm.training.config import TrainerConfig
from openxlstm.training.metrics import IGNORED
from openxlstm.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from openxlstm.training.schedules import learning_rate

PIECE = 256  # tokens that an evaluation reads at once
TEST_TOKENS = 2**15  # tokens of a batch in evaluation
CHECKPOINT_SECONDS = 45.0


@dataclass(frozen=True)
class Trial:
    """What is trained on what, and how."""

    task: str
    """Name of the task."""
    model: str
    """Name of the network."""
    width: int = 32
    """Width of the network."""
    blocks: int | None = None
    """Its number of blocks; None is the network's own."""
    seed: int = 0
    """Of the initial values and of the training data."""
    protocol: str | None = None
    """Where answers are asked; None is the task's own."""
    train_lengths: tuple[int, int] = (3, 40)
    """Shortest and longest training string."""
    test_lengths: tuple[tuple[int, int], ...] = ((3, 40), (40, 256), (2048, 2048))
    """Ranges of lengths that accuracy is measured on."""
    test_strings: int = 512
    """Strings per range."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 128
    """Strings per update."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule, after a warm-up over a tenth of the steps."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""

    def __post_init__(self) -> None:
        task = get_task(self.task)
        get_network(self.model)
        task.check_protocol(self.protocol)
        for low, high in (self.train_lengths, *self.test_lengths):
            task.lengths(low, high)
        for name in ("width", "test_strings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.trainer_config()

    def trainer_config(self) -> TrainerConfig:
        """Optimiser and schedule."""
        return TrainerConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip=1.0,
            final_factor=0.02,
            betas=(0.9, 0.99),
        )


def build_network(trial: Trial) -> nn.Module:
    """The network of a trial with the initial values of its seed."""
    network, task = get_network(trial.model), get_task(trial.task)
    with torch.random.fork_rng([]):
        torch.manual_seed(trial.seed)
        return network.build(task.vocab_size, trial.width, trial.blocks or network.blocks)


def run_trial(
    trial: Trial, *, checkpoint: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train and measure.

    Args:
        trial: what to do.
        checkpoint: file to keep progress in; if it is there, the trial goes on from it. Removed at the end.
        report: called with a line about every twentieth of the way.

    Returns:
        what JSON can hold: the trial, ``parameters``, ``seconds``, ``final_loss`` (mean of the last tenth of
        the steps), ``curve`` of (step, loss), and per range of lengths ``accuracy`` and ``scaled`` accuracy.
    """
    task, model = get_task(trial.task), build_network(trial)
    losses, seconds = _train(trial, task, model, checkpoint, report)
    measured = [measure(model, task, trial, lengths) for lengths in trial.test_lengths]
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    tail = losses[-max(1, len(losses) // 10) :]
    every = max(1, len(losses) // 100)
    return {
        "trial": config_to_dict(trial),
        "parameters": count_parameters(model),
        "chance": task.chance,
        "seconds": round(seconds, 2),
        "final_loss": sum(tail) / len(tail),
        "curve": [
            [n, sum(losses[n : n + every]) / len(losses[n : n + every])] for n in range(0, len(losses), every)
        ],
        "accuracy": measured,
    }


def _train(
    trial: Trial, task: Task, model: nn.Module, checkpoint: Path | None, report: Callable[[str], None]
) -> tuple[list[float], float]:
    """Updates; returns the losses and the seconds spent."""
    config = trial.trainer_config()
    optimizer = build_optimizer(model, config)
    losses: list[float] = []
    seconds = 0.0
    if checkpoint is not None and checkpoint.is_file():
        losses, seconds = _restore(checkpoint, model, optimizer)
    model.train()
    start = saved = time.perf_counter()
    before = seconds
    while len(losses) < trial.steps:
        step = len(losses)
        losses.append(_update(trial, task, model, optimizer, config, step))
        now = time.perf_counter()
        seconds = before + now - start
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(
                f"the loss of {trial.model} on {trial.task} is {losses[-1]} at step {step + 1}; "
                "use a lower learning rate"
            )
        if checkpoint is not None and now - saved > CHECKPOINT_SECONDS:
            _save(checkpoint, model, optimizer, losses, seconds)
            saved = now
        if (step + 1) % max(1, trial.steps // 20) == 0:
            report(f"{trial.task} {trial.model} step {step + 1}: loss {losses[-1]:.4f}, {seconds:.0f} s")
    return losses, seconds


def _update(
    trial: Trial,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainerConfig,
    step: int,
) -> float:
    numbers = range(step * trial.batch_size, (step + 1) * trial.batch_size)
    batch = task.batch(
        "train", numbers, lengths=trial.train_lengths, protocol=trial.protocol, seed=trial.seed
    )
    counted = int((batch.targets != IGNORED).sum())
    loss = summed_loss(model, batch.tokens, batch.targets) / max(counted, 1)
    loss.backward()
    clip_gradients(model.parameters(), float(gradient_norm(model.parameters())), config.clip)
    set_learning_rate(optimizer, learning_rate(config, step))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[float], seconds: float
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["seconds"] = torch.tensor([seconds], dtype=torch.float64)
    atomic_write_bytes(path, save({name: t.contiguous() for name, t in tensors.items()}))


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[float], float]:
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    prefix = "optimizer."
    moments = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    load_optimizer_tensors(model, optimizer, moments)
    return tensors["losses"].tolist(), float(tensors["seconds"])


def measure(model: nn.Module, task: Task, trial: Trial, lengths: tuple[int, int]) -> dict[str, Any]:
    """Accuracy on unseen strings of a range of lengths.

    With the protocol "every", each prefix is a string of its own: the strings are as long as the range allows
    and the answers to prefixes in the range count, so short prefixes do not make a long range look easy.
    """
    protocol = task.check_protocol(trial.protocol)
    possible = task.lengths(*lengths)
    low, high = int(possible[0]), int(possible[-1])
    drawn = (high, high) if protocol == "every" else (low, high)
    rows = max(1, min(trial.test_strings, TEST_TOKENS // min(high, PIECE)))
    right = counted = 0
    for start in range(0, trial.test_strings, rows):
        numbers = range(start, min(start + rows, trial.test_strings))
        batch = task.batch("test", numbers, lengths=drawn, protocol=protocol)
        hits, asked = _hits(model, batch)
        if protocol == "every":
            hits, asked = hits[:, low - 1 :], asked[:, low - 1 :]
        right, counted = right + int(hits.sum()), counted + int(asked.sum())
    accuracy = right / counted
    return {
        "lengths": list(lengths),
        "accuracy": accuracy,
        "scaled": task.scaled(accuracy),
        "answers": counted,
    }


def _hits(model: nn.Module, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Where the most likely token is the asked one, and where one was asked, both bool (B, T)."""
    predicted = torch.cat([logits.argmax(-1) for logits in streamed_logits(model, batch.tokens)], dim=1)
    asked = batch.targets != IGNORED
    return (predicted == batch.targets) & asked, asked


def streamed_logits(model: nn.Module, tokens: Tensor, piece: int = PIECE) -> Iterator[Tensor]:
    """Logits (B, up to ``piece``, V) of ``tokens`` (B, T), the state carried from piece to piece.

    A network without states reads everything at once.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if not hasattr(model, "initial_state"):
                yield model(tokens)
                return
            state: Any = None
            for part in tokens.split(piece, dim=1):
                logits, state = model(part, state, return_state=True)
                yield logits
    finally:
        model.train(training)
