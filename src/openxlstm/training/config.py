"""Settings of a training run, with the checks that need nothing but the numbers themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ScheduleName = Literal["cosine", "exponential", "wsd", "constant"]
PrecisionName = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainerConfig:
    """How to train: length, batch, optimiser, schedule, numerics, and what to write when.

    The defaults are the published ones of the large xLSTM recipe where it states one (AdamW, weight decay and
    clipping) and suit a small model otherwise. The context length belongs to the data.

    Raises:
        ValueError: a value that cannot work, with the field, the value and what would do.
    """

    steps: int = 1000
    """Optimiser updates in the whole run."""
    batch_size: int = 32
    """Sequences per update, over all processes."""
    gradient_accumulation: int = 1
    """Parts that each process splits its share of a batch into: less memory, the same gradient."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Weight decay of the parameters that the model wants decayed: matrices; no norms, biases, embeddings."""
    clip: float = 0.5
    """Largest global gradient norm; longer gradients are scaled down to it. 0: never."""

    schedule: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up. cosine, exponential: fall to final_factor; wsd: stay,
    then fall to final_factor during the cool-down; constant: stay."""
    warmup_steps: int | None = None
    """Updates of linear warm-up. None: a tenth of the run, at most 750."""
    cooldown_steps: int | None = None
    """Updates of linear cool-down at the end: to final_factor for wsd, to zero for the others.
    None: a fifth of the run for wsd, 0 for the others."""
    final_factor: float = 0.1
    """Share of the peak learning rate that is left at the end of the decay."""

    precision: PrecisionName = "auto"
    """Matrix products under autocast: bfloat16, plain float32, or auto (bfloat16 where the device has it
    in hardware). Parameters and optimiser state are float32 in either case."""
    device: str = "auto"
    """Where to train: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps."""
    compile: bool = False
    """Compile the model with torch.compile (slow first step, faster afterwards)."""
    seed: int = 0
    """Seed of dropout and of everything else that the trainer draws."""

    validation_every: int = 100
    """Updates between two validations, and once at the end. 0: only at the end."""
    validation_batches: int = 16
    """Batches per validation, always the first ones. 0: the whole split, once."""
    sample_every: int = 500
    """Updates between two samples of generated text, and once at the end. 0: never."""
    log_every: int = 1
    """Updates between two lines of the log."""
    checkpoint_every: int = 500
    """Updates between two checkpoints, and once at the end. 0: only at the end and on interruption."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept; older ones are deleted. 0: keep all."""
    output: Path = Path("runs/xlstm")
    """Directory of the run: log.jsonl, checkpoints/, model/, loss.png, tensorboard/."""
    tensorboard: bool = True
    """Also log to TensorBoard, if it is installed."""
    progress: bool = True
    """Show a progress bar and messages on standard error."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "validation_every",
            "validation_batches",
            "sample_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a positive number")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "0 or more")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        self._require("final_factor", 0 <= self.final_factor <= 1, "between 0 and 1")
        if self.schedule == "exponential":
            self._require("final_factor", self.final_factor > 0, "above 0 for the exponential schedule")
        self._require("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        self._require("schedule", self.schedule in ScheduleName.__args__, f"one of {ScheduleName.__args__}")
        self._require(
            "precision", self.precision in PrecisionName.__args__, f"one of {PrecisionName.__args__}"
        )
        if self.gradient_accumulation > self.batch_size:
            raise ValueError(
                f"gradient_accumulation ({self.gradient_accumulation}) must not exceed batch_size "
                f"({self.batch_size}): a part needs at least one sequence"
            )
        self._require("warmup_steps", self.warmup >= 0, "0 or more")
        self._require("cooldown_steps", self.cooldown >= 0, "0 or more")
        if self.warmup + self.cooldown > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup}) and cooldown_steps ({self.cooldown}) do not fit into "
                f"{self.steps} steps: shorten them or train longer"
            )

    @property
    def warmup(self) -> int:
        """Updates of warm-up, the default resolved."""
        return min(750, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def cooldown(self) -> int:
        """Updates of cool-down, the default resolved."""
        if self.cooldown_steps is not None:
            return self.cooldown_steps
        return self.steps // 5 if self.schedule == "wsd" else 0

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
