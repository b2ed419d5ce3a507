"""Models of inference time on one device, from measurements: physical parameters that stay positive.

    time to first token   t = FLOPs / alpha + epsilon                  alpha: attained FLOPs per second
    time of one step      t = bytes / beta + epsilon + B epsilon_b     beta: attained bytes per second

The counts come from :mod:`openxlstm.models.accounting`. Both are linear in (1 / alpha, epsilon, ...), so each
is a bounded linear least-squares problem in relative errors, solved exactly; the published procedure,
unbounded and in milliseconds, gave negative latencies and a negative bandwidth. Outliers are weighted down
(Huber, 10 %). Rates stay below what the device's data sheet allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from openxlstm.models import TransformerLMConfig, xLSTMLargeConfig
from openxlstm.models.accounting import Cost, decode_cost, find_device, prefill_cost
from openxlstm.scaling.data import Table, require_runs

LEAST_LATENCY = 1e-6  # seconds: one kernel launch; keeps latencies positive
LEAST_STEP_BATCH = 8  # below, steps are bound by launching kernels


@dataclass(frozen=True)
class TimeModel:
    """Time of a call as a linear function of what it costs."""

    rate: float
    """alpha (FLOPs per second) or beta (bytes per second)."""
    latency: float
    """epsilon, seconds per call."""
    row_latency: float
    """epsilon_b, seconds per row of the batch; 0 in models without it."""
    relative_errors: tuple[float, ...]
    """|predicted / measured - 1| of the measurements it was fitted to."""

    def __call__(self, work: Any, batch_size: Any = 0) -> Any:
        """Seconds for ``work`` FLOPs or bytes."""
        return np.asarray(work, float) / self.rate + self.latency + self.row_latency * np.asarray(batch_size)

    @property
    def median_error(self) -> float:
        """Median relative error."""
        return float(np.median(self.relative_errors))


def fit_time(work: Any, seconds: Any, batch_sizes: Any = None, *, peak: float = np.inf) -> TimeModel:
    """Fit a time model.

    Args:
        work: FLOPs or bytes of each call, (n).
        seconds: measured times, (n).
        batch_sizes: rows of each call, (n), for a latency per row; None for none.
        peak: what the device can do per second; the fitted rate stays below.

    Raises:
        ValueError: fewer than three measurements, or values that are not positive and finite.
    """
    from scipy.optimize import lsq_linear

    work, seconds = np.asarray(work, float), np.asarray(seconds, float)
    require_runs(len(work), 3, "a model of times")
    if not (np.isfinite(work) & np.isfinite(seconds) & (work > 0) & (seconds > 0)).all():
        raise ValueError("work and times must be positive and finite; drop what was not measured")
    columns = [work / work.mean(), np.ones_like(work)]
    if batch_sizes is not None:
        columns.append(np.asarray(batch_sizes, float))
    design = np.stack(columns, 1) / seconds[:, None]
    least = max(work.mean() / peak, 1e-12)
    lower = np.array([least, LEAST_LATENCY, 1e-12][: len(columns)])
    weights, solution, errors = np.ones(len(work)), lower, np.ones(len(work))
    for _ in range(30):
        root = np.sqrt(weights)
        solution = lsq_linear(design * root[:, None], root, bounds=(lower, np.inf)).x
        errors = np.abs(design @ solution - 1)
        weights = np.minimum(1.0, 0.1 / np.maximum(errors, 1e-12))
    slope, latency, *rest = (float(value) for value in solution)
    return TimeModel(
        float(work.mean()) / slope, latency, rest[0] if rest else 0.0, tuple(float(e) for e in errors)
    )


def measured_config(row: Any) -> xLSTMLargeConfig | TransformerLMConfig:
    """Configuration of a measured model, from a row of :func:`read_measurements`.

    Raises:
        ValueError: a family other than "xlstm" and "llama2".
    """
    width, heads, blocks, vocabulary, ffn_dim = (
        int(row[f"model_params.{name}"])
        for name in ("embedding_dim", "num_heads", "num_blocks", "vocab_size", "ffn_dim")
    )
    if row["model.model_type"] == "xlstm":
        chunk_size = int(row["model_params.chunk_size"])
        return xLSTMLargeConfig(width, heads, blocks, vocabulary, ffn_dim=ffn_dim, chunk_size=chunk_size)
    if row["model.model_type"] == "llama2":
        return TransformerLMConfig(width, heads, blocks, vocabulary, ffn_dim=ffn_dim)
    raise ValueError(f"unknown family '{row['model.model_type']}' of measurements: expected xlstm or llama2")


def fit_measurements(table: Table, quantity: str, device: str = "h100") -> dict[tuple[str, str], TimeModel]:
    """Time models per family and size.

    Args:
        table: from :func:`openxlstm.scaling.data.read_measurements`.
        quantity: ``"ttft"`` (prompts of at least one token) or ``"steptime"`` (at least 8 rows).
        device: what was measured on; its data sheet bounds the rates.

    Returns:
        (family, size) -> model, sizes such as "160m".

    Raises:
        ValueError: another quantity, or too few measurements.
    """
    if quantity not in ("ttft", "steptime"):
        raise ValueError(f"quantity must be 'ttft' or 'steptime', got {quantity!r}")
    limits = find_device(device)
    measured = table[(table[f"measured_data.{quantity}"] > 0) & (table["input_params.prefill"] > 0)]
    if quantity == "steptime":
        measured = measured[measured["input_params.batchsize"] >= LEAST_STEP_BATCH]
    models: dict[tuple[str, str], TimeModel] = {}
    for (family, tag), group in measured.groupby(["model.model_type", "model.model_tag"]):
        costs = [measured_cost(row, quantity) for _, row in group.iterrows()]
        seconds = group[f"measured_data.{quantity}"].to_numpy() / 1e3
        size = str(tag).rpartition("_")[2]
        if quantity == "ttft":
            work = [cost.flops for cost in costs]
            models[str(family), size] = fit_time(work, seconds, peak=limits.peak_flops)
        else:
            rows = group["input_params.batchsize"].to_numpy()
            work = [cost.bytes for cost in costs]
            models[str(family), size] = fit_time(work, seconds, rows, peak=limits.bandwidth)
    if not models:
        raise ValueError(f"the table has no measured {quantity} for prompts of at least one token")
    return models


def measured_cost(row: Any, quantity: str) -> Cost:
    """What the measured call costs."""
    config = measured_config(row)
    batch, prefill = int(row["input_params.batchsize"]), int(row["input_params.prefill"])
    return prefill_cost(config, batch, prefill) if quantity == "ttft" else decode_cost(config, batch, prefill)
