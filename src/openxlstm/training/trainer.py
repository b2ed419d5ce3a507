"""The training loop: plain PyTorch, from a model and a loader to a trained model in a directory.

One update on a batch whose targets count N tokens over all processes, split into parts:

    loss = sum over parts of (sum of cross-entropies) / N          exact, however the tokens are spread
    stop if the loss or the gradient norm is not finite
    clip, set the learning rate, AdamW

What must hold:
* A run is a function of its settings and data: same seed, same machine, same threads, same bits. Validation
  and sampling draw from forked generators and change nothing.
* Resuming is exact: parameters, moments, generators, data position and log continue as if nothing had been.
* The batch of a step depends on the step alone (``loader.batch(step, rank, world_size)``).
* The loop knows no more about processes than ``rank`` and ``world_size``: a model that was sharded or wrapped
  from outside is trained by the same lines. Stop signals must reach every process at once. Saving from many
  processes is not supported yet: process 0 alone writes, and of the generators only its own are saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openxlstm.checkpoint import save_pretrained
from openxlstm.config import config_to_dict
from openxlstm.data import Batch
from openxlstm.models.language_model import LanguageModel
from openxlstm.plots import plot_loss_curve
from openxlstm.runtime import environment_report, resolve_device, resolve_precision, set_seed
from openxlstm.training.checkpointing import CheckpointStore
from openxlstm.training.config import TrainerConfig
from openxlstm.training.generators import generator_state, restore_generators
from openxlstm.training.interruption import StopRequest, TrainingInterrupted
from openxlstm.training.logging import RunLog
from openxlstm.training.metrics import Speedometer, in_bits_per_byte, speedometer
from openxlstm.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from openxlstm.training.resumption import check_continuation, describe_model, refuse_existing_run
from openxlstm.training.schedules import learning_rate


class NonFiniteLossError(ArithmeticError):
    """The loss or the gradient norm became infinite or NaN; the parameters were not updated with it."""


class Loader(Protocol):
    """What the trainer needs from the data; :class:`~openxlstm.data.PackedLoader` is one."""

    def __len__(self) -> int:
        """Batches in a pass."""
        ...

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        """The part of one process in the batch of a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position and identity of the data, as JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; refuses the state of other data."""
        ...


class TrainingResult(NamedTuple):
    """What a finished run gives."""

    step: int
    """Updates done."""
    validation_loss: float | None
    """Nats per token on the validation data at the end, if there is any."""
    bits_per_byte: float | None
    """The same in bits per byte, if the data knows its text."""
    tokens: int
    """Tokens trained on, repeats included."""
    seconds: float
    """Time spent in updates, over all interruptions."""
    model_directory: Path
    """Where the model was saved."""


class Trainer:
    """Trains a language model.

    Args:
        model: moved to the configured device.
        config: how to train.
        train_loader: gives the batch of a step.
        validation_loader: the same for held-out text, in sequential order.
        tokenizer: saved with the model.
        sample_callback: ``(model, step) -> texts``, called every ``sample_every`` updates without gradients.
        rank, world_size: this process among those that train together; ``torch.distributed`` must be set up
            when there is more than one. Process 0 writes the files.
        resume_hint: how the user resumes this run, for messages.

    Raises:
        ValueError: an unavailable device, or parameter groups that do not cover the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: TrainerConfig,
        train_loader: Loader,
        validation_loader: Loader | None = None,
        tokenizer: Any = None,
        sample_callback: Callable[[nn.Module, int], list[str]] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        resume_hint: str = "resume with Trainer.fit(resume=True)",
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.summed_loss = torch.compile(model.summed_loss) if config.compile else model.summed_loss
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.tokenizer, self.sample_callback = tokenizer, sample_callback
        self.rank, self.world_size, self.resume_hint = rank, world_size, resume_hint
        self.optimizer = build_optimizer(self.model, config)
        self.autocast_dtype = resolve_precision(config.precision, self.device)
        self.checkpoints = CheckpointStore(
            config.output / "checkpoints", keep=config.keep_checkpoints, report=self._message
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.validation_loss: float | None = None
        self.speed = Speedometer()
        self.log: RunLog

    # ------------------------------------------------------------------ the run

    def check(self) -> None:
        """One forward pass on one sequence, so that settings that cannot work are found before a run starts.

        Raises:
            ValueError: an unknown backend, a batch of another size, or tokens outside the vocabulary.
        """
        batch = self._batch(self.train_loader, 0)
        dtype = self.autocast_dtype
        with self._aside(), torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            self.model(batch.tokens[:1], reset=batch.reset[:1])

    def fit(self, *, resume: bool = False, on_start: Callable[[], None] = lambda: None) -> TrainingResult:
        """Train until ``config.steps`` updates are done, then save the model and draw the loss curve.

        Args:
            resume: continue from the latest whole checkpoint in the output directory, or from the start if
                there is none yet. The model, the data, ``batch_size`` and ``seed`` must be those of the
                checkpoint; every other setting may differ (longer runs, other rates) and counts from here on.
            on_start: called in process 0 once the run is accepted, before anything is written.

        Raises:
            FileExistsError: the output directory holds a run, or its model or log, and ``resume`` is false.
            ValueError: no readable checkpoint among existing ones, or one of another model or other data.
            NonFiniteLossError: loss or gradient norm became infinite or NaN.
            TrainingInterrupted: SIGINT or SIGTERM; everything is saved.
            OSError: a checkpoint could not be written; earlier ones are intact.
        """
        set_seed(self.config.seed + self.rank)
        changed: dict[str, Any] = {}
        if resume:
            changed = self._restore()
        else:
            refuse_existing_run(self.config.output, self.resume_hint)
        context_length = self._batch(self.train_loader, self.step).tokens.shape[1]
        self.speed = speedometer(self.model, context_length, self.autocast_dtype, self.device)
        if self.rank == 0:
            self.checkpoints.clean()
            on_start()
        self.log = self._open_log()
        try:
            self._record_start(changed)
            with StopRequest() as stop:
                while self.step < self.config.steps:
                    self._train_step()
                    self._periodic(stop)
        finally:
            self.log.close()
        return self._finish()

    def _train_step(self) -> None:
        """One update: gradients of all parts, checks, clipping, AdamW, one log record."""
        start = time.perf_counter()
        batch = self._batch(self.train_loader, self.step)
        counted = self._sum_over_processes(torch.tensor(batch.num_targets)).clamp_min(1)
        self.model.train()
        losses: list[Tensor] = []
        for part in split_batch(batch, self.config.gradient_accumulation):
            loss = self._summed_loss(part) / counted
            (loss * self.world_size).backward()  # data parallelism averages gradients over processes
            losses.append(loss.detach())
        total = float(self._sum_over_processes(torch.stack(losses).sum()))
        norm = float(gradient_norm(self.model.parameters()))
        rate = learning_rate(self.config, self.step)
        self._require_finite(total, norm, rate)
        clip_gradients(self.model.parameters(), norm, self.config.clip)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, seconds = batch.tokens.numel() * self.world_size, time.perf_counter() - start
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.speed.add(tokens, seconds)
        self._record_step(total, norm, rate)

    def _periodic(self, stop: StopRequest) -> None:
        """Whatever is due after an update: validation, samples, a checkpoint, leaving."""
        if self._due(self.config.validation_every):
            self._validate()
        if self.config.sample_every and self._due(self.config.sample_every):
            self._sample()
        if self._due(self.config.checkpoint_every) or stop.received:
            path = self.save_checkpoint()
            if stop.received and self.step < self.config.steps:
                raise TrainingInterrupted(
                    f"stopped after step {self.step} of {self.config.steps}, everything is saved in "
                    f"'{path}'; {self.resume_hint}",
                    self.step,
                    path,
                )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    # ------------------------------------------------------------------ computing

    def _batch(self, loader: Loader, step: int) -> Batch:
        """The batch of ``step`` for this process, on the device."""
        batch = loader.batch(step, self.rank, self.world_size)
        sequences = batch.tokens.shape[0] * self.world_size
        if loader is self.train_loader and sequences != self.config.batch_size:
            raise ValueError(
                f"the loader gives {sequences} sequences per step, but batch_size is "
                f"{self.config.batch_size}: build the loader with the same batch size"
            )
        return batch.to(self.device)

    def _summed_loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies in nats over the targets that count."""
        dtype = self.autocast_dtype
        with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            return self.summed_loss(batch.tokens, batch.targets, reset=batch.reset)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            value = value.to(self.device)
            torch.distributed.all_reduce(value)
        return value

    def _require_finite(self, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        latest = self.checkpoints.latest()
        rescue = (
            f"the last good checkpoint is '{latest}': {self.resume_hint}, with a lower learning_rate or clip"
            if latest
            else "no checkpoint was written yet: start again with a lower learning_rate or clip"
        )
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        raise NonFiniteLossError(
            f"{what} at step {self.step + 1} (learning rate {rate:.3g}), training stopped before the update; "
            f"{rescue}"
        )

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Evaluation mode without gradients, with generators that are put back afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            self.model.eval()
            try:
                yield
            finally:
                self.model.train()

    def evaluate(self, loader: Loader, batches: int = 0) -> float:
        """Mean loss in nats per token over the first ``batches`` batches of ``loader``; 0 is a whole pass."""
        total, counted = 0.0, 0
        with self._aside():
            for index in range(min(batches or len(loader), len(loader))):
                batch = self._batch(loader, index)
                total += float(self._summed_loss(batch))
                counted += batch.num_targets
        total = float(self._sum_over_processes(torch.tensor(total, dtype=torch.float64)))
        return total / max(1, int(self._sum_over_processes(torch.tensor(counted))))

    # ------------------------------------------------------------------ reporting

    def _open_log(self) -> RunLog:
        return RunLog(
            self.config.output if self.rank == 0 else None,
            steps=self.config.steps,
            step=self.step,
            tensorboard=self.config.tensorboard,
            progress=self.config.progress,
        )

    def _record_start(self, changed: dict[str, Any]) -> None:
        if self.step:
            if changed:
                self.log.write("resume", self.step, {"changed": changed})
            return
        values = {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model": describe_model(self.model),
            "train": config_to_dict(self.config),
            "environment": environment_report(),
        }
        self.log.write("start", 0, values)

    def _record_step(self, loss: float, norm: float, rate: float) -> None:
        speed: dict[str, float] = {}
        if self._due(self.config.log_every):
            speed = self.speed.read()
            values = {"loss": loss, **in_bits_per_byte(loss, self.train_loader), "gradient_norm": norm}
            values |= {"learning_rate": rate, "tokens": self.tokens, **speed}
            self.log.write("train", self.step, values)
        self.log.advance(loss, speed)

    def _validate(self) -> None:
        if self.validation_loader is None:
            return
        start = time.perf_counter()
        loss = self.validation_loss = self.evaluate(self.validation_loader, self.config.validation_batches)
        bits, seconds = in_bits_per_byte(loss, self.validation_loader), time.perf_counter() - start
        self.log.write("validation", self.step, {"loss": loss, **bits, "seconds": seconds})
        shown = "".join(f", {value:.3f} bits per byte" for value in bits.values())
        self._message(f"step {self.step}: validation loss {loss:.4f}{shown}")

    def _sample(self) -> None:
        if self.sample_callback is None or self.rank != 0:
            return
        with self._aside():
            texts = self.sample_callback(self.model, self.step)
        self.log.write("sample", self.step, {"texts": texts})
        for text in texts:
            self._message(f"step {self.step}: {text}")

    def _message(self, text: str) -> None:
        if self.config.progress and self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def _finish(self) -> TrainingResult:
        """Save the model for use and draw the curve."""
        output, loss = self.config.output, self.validation_loss
        if self.rank == 0:
            save_pretrained(self.model, output / "model", tokenizer=self.tokenizer)
            try:
                plot_loss_curve(output / "log.jsonl", output / "loss.png")
            except ImportError:
                self._message("no loss.png: matplotlib is not installed (pip install 'openxlstm[train]')")
        bits = None if loss is None else in_bits_per_byte(loss, self.validation_loader).get("bits_per_byte")
        return TrainingResult(self.step, loss, bits, self.tokens, self.seconds, output / "model")

    # ------------------------------------------------------------------ saving and resuming

    def save_checkpoint(self) -> Path:
        """Write everything that resuming needs, in a directory that ``load_pretrained`` reads too.

        Process 0 writes, its own generators among the rest.

        Raises:
            OSError: it could not be written; earlier checkpoints are intact.
        """
        if self.rank != 0:
            return self.checkpoints.path(self.step)
        generators, generator_values = generator_state(self.device)
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "random": generators,
        }
        state = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "validation_loss": self.validation_loss,
            "train": config_to_dict(self.config),
            "model": describe_model(self.model),
            "data": {**self.train_loader.state_dict(), "step": self.step},
            "random": generator_values,
        }
        texts = {"config.json": json.dumps(describe_model(self.model), indent=2) + "\n"}
        if self.tokenizer is not None:
            texts |= self.tokenizer.files()
        self.log.sync()
        return self.checkpoints.save(self.step, tensors, state, texts)

    def _restore(self) -> dict[str, Any]:
        """Continue from the latest readable checkpoint; returns the settings that differ from it."""
        checkpoint = self.checkpoints.load_latest()
        if checkpoint is None:
            self._message("there is no checkpoint yet: starting from the beginning")
            return {}
        changed = check_continuation(checkpoint, self.model, self.config)
        state, tensors = checkpoint.state, checkpoint.tensors
        try:
            self.model.load_state_dict(tensors["model"])
            load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])
            restore_generators(tensors["random"], state["random"], self.device)
        except (RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint '{checkpoint.path}' does not fit the model: {reason}") from None
        self.train_loader.load_state_dict(state["data"])
        self.step, self.tokens, self.seconds = checkpoint.step, state["tokens"], state["seconds"]
        self.validation_loss = state["validation_loss"]
        self._message(f"resuming from '{checkpoint.path}'")
        return changed


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into at most ``parts`` batches with about equally many sequences each."""
    parts = min(parts, batch.tokens.shape[0])
    split = [tensor.tensor_split(parts) for tensor in batch]
    return [Batch(*tensors) for tensors in zip(*split, strict=True)]
