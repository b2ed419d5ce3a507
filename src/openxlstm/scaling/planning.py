"""Plans for a budget: which sizes to train on how many tokens, their loss, time, memory and inference cost.

For each family the model of published proportions whose predicted loss is least is the compute-optimal one,
with FLOPs counted from its configuration at the context (attention included). Over-trained options are
smaller models on the same budget: a little more loss for cheaper inference.

Assumptions, which the output states: the utilisation of the devices; float32 parameters, gradients and two
moments (16 bytes per parameter) divided over the devices, activations recomputed; inference in bfloat16 at
the device's limits (a lower bound of time), states of recurrent models in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openxlstm.models import parameter_count, state_bytes
from openxlstm.models.accounting import (
    Device,
    decode_cost,
    inference_memory,
    prefill_cost,
    training_flops_per_token,
)
from openxlstm.scaling.design import recommended_batch, recommended_rate, shapes
from openxlstm.scaling.laws import Law, Outside

TRAINING_BYTES = 16
"""Per parameter: weights, gradients, two moments, all float32."""
SHRINKS = (1, 2, 4, 8)
"""Compute-optimal size over the sizes of the options."""


@dataclass(frozen=True)
class Option:
    """One way to spend the budget."""

    family: str
    shrink: float
    """Compute-optimal size over this size, as asked for; 1 is compute-optimal."""
    config: Any
    num_params: int
    num_tokens: float
    flops: float
    loss: float
    interval: tuple[float, float]
    """95 % prediction interval of the loss."""
    seconds: float | None
    """Training time on the devices; None without any."""
    training_memory: float
    """Bytes per device: parameters, gradients, moments and one batch row's recomputed activations."""
    inference_memory: float
    """Bytes: weights and state or cache of one row at the context."""
    state_memory: float
    """Bytes of the state or cache of one row at the context."""
    prefill_seconds: float
    """Reading a prompt of the context's length, batch 1, at the device's limits."""
    step_seconds: float
    """One more token after the context, batch 1, at the device's limits."""
    batch_step_seconds: float
    """The same for 32 rows."""
    learning_rate: float
    batch_tokens: float
    outside: tuple[Outside, ...]
    """Where it lies outside the range of the law's runs."""
    notes: tuple[str, ...]
    """What else a reader must know."""

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.num_tokens / self.num_params


def budget_of(gpus: int, hours: float, device: Device, utilisation: float) -> float:
    """FLOPs that ``gpus`` devices do in ``hours``.

    Raises:
        ValueError: a number that is not positive, or a utilisation above 1.
    """
    for name, value in (("gpus", gpus), ("hours", hours)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    _check_utilisation(utilisation)
    return gpus * hours * 3600 * device.peak_flops * utilisation


def _check_utilisation(utilisation: float) -> None:
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must lie in (0, 1], got {utilisation}")


def plan(
    flops: float,
    laws: dict[str, Law],
    *,
    device: Device,
    gpus: int | None = None,
    utilisation: float = 0.4,
    context_length: int = 8192,
    vocab_size: int = 50304,
    shrinks: Sequence[float] = SHRINKS,
) -> dict[str, list[Option]]:
    """Options for a budget.

    Args:
        flops: training FLOPs.
        laws: of each family, "xlstm" or "transformer".
        device: for times and memory.
        gpus: devices that train; None: training time is left out, memory is that of one device.
        utilisation: share of the peak that training attains.
        context_length: tokens of training rows and of the prompt whose inference is costed.
        vocab_size: of the tokenizer.
        shrinks: sizes of the options, as the compute-optimal size over theirs.

    Returns:
        family -> options, the compute-optimal one first.

    Raises:
        ValueError: a budget that is not positive, or an unknown family.
    """
    if not 0 < flops < float("inf"):
        raise ValueError(f"flops must be a positive number of FLOPs, got {flops}")
    _check_utilisation(utilisation)
    for name, value, least in (("context_length", context_length, 1), ("vocab_size", vocab_size, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    result: dict[str, list[Option]] = {}
    for family, law in laws.items():
        ladder: list[tuple[float, int, float, Any]] = []
        for config in shapes(family, vocab_size):
            size = parameter_count(config)
            tokens = flops / training_flops_per_token(config, context_length)
            ladder.append((law.loss(size, tokens), size, tokens, config))
        best = min(ladder, key=lambda entry: entry[0])
        if best[1] in (ladder[0][1], ladder[-1][1]):
            edge, other = ("smallest", "larger") if best[1] == ladder[0][1] else ("largest", "smaller")
            raise ValueError(
                f"{family}: a budget of {flops:.3g} FLOPs asks for a model beyond the {edge} this planner "
                f"knows ({best[1]:.3g} parameters); give a {other} budget"
            )
        chosen: dict[int, tuple[float, tuple[float, int, float, Any]]] = {}
        for shrink in shrinks:
            target = best[1] / shrink
            entry = min(ladder, key=lambda e, target=target: abs(e[1] / target - 1))
            chosen.setdefault(entry[1], (shrink, entry))
        where = device, gpus, utilisation, context_length
        result[family] = [_option(family, law, s, entry, flops, *where) for s, entry in chosen.values()]
    return result


def _option(
    family: str,
    law: Law,
    shrink: float,
    entry: tuple[float, int, float, Any],
    flops: float,
    device: Device,
    gpus: int | None,
    utilisation: float,
    context_length: int,
) -> Option:
    loss, size, tokens, config = entry
    limits = device.peak_flops, device.bandwidth
    notes: list[str] = []
    if context_length != law.context_length:
        notes.append(f"the law was fitted at context {law.context_length}, this is {context_length}")
    residual = (
        2 * context_length * config.embedding_dim * (config.num_blocks + 34)
    )  # rows kept, one block live
    training = TRAINING_BYTES * size / (gpus or 1) + residual
    if training > device.memory:
        memory = f"{device.memory / 1e9:.0f} GB of one {device.name}"
        notes.append(f"training needs more than the {memory}: use more devices")
    return Option(
        family,
        shrink,
        config,
        size,
        tokens,
        flops,
        loss,
        law.interval(size, tokens),
        None if gpus is None else flops / (gpus * device.peak_flops * utilisation),
        training,
        inference_memory(config, 1, context_length),
        state_bytes(config, 1, context_length, cache_bytes=2),
        prefill_cost(config, 1, context_length).seconds(*limits),
        decode_cost(config, 1, context_length).seconds(*limits),
        decode_cost(config, 32, context_length).seconds(*limits),
        recommended_rate(size, flops),
        recommended_batch(size, flops),
        tuple(law.outside(size, tokens, flops)),
        tuple(notes),
    )
