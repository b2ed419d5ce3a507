"""What the directory of published measurements holds, and selections of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openxlstm.models import TransformerLMConfig, xLSTMLargeConfig
from openxlstm.scaling.data import Table, read_measurements, read_runs, read_table
from openxlstm.scaling.objective import NAMES

VOCABULARY = 50304
FAMILIES = {"mlstm": "xLSTM", "llama": "Transformer"}
CONTEXTS = (2048, 8192, 16384)
SHAPE = ("embedding_dim", "num_heads", "num_blocks")
CELL = ("model", "experiment_set", "token_param_range", "fit_gamma", "huber_delta")
"""What tells one published parametric fit from another."""


@dataclass
class Inputs:
    """What the directory holds; missing references are None."""

    all_runs: Table
    """Also those without a loss."""
    runs: Table
    measurements: Table | None
    optima: Table | None
    laws: Table | None
    slopes: Table | None
    parametric: Table | None
    times: Table | None


def read_inputs(directory: Path) -> Inputs:
    """Read the directory.

    Raises:
        FileNotFoundError: no such directory, or no table of runs in it.
        ValueError: a table lacks columns.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"directory '{directory}' does not exist")
    path = next((p for s in ("parquet", "csv") if (p := directory / f"training_runs.{s}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"'{directory}' holds neither training_runs.parquet nor training_runs.csv")
    needed = ("experiment", "preset_ratio", *SHAPE, "ffn_dim", "chunk_size", "global_batch_size", "num_steps")
    everything = read_table(path, needed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report counts what was left out
        runs = read_runs(path)

    def reference(name: str, *columns: str) -> Table | None:
        file = directory / f"ref_{name}.csv"
        return read_table(file, columns) if file.is_file() else None

    measured = directory / "inference_measurements.parquet"
    return Inputs(
        everything[everything["flops"].notna()],
        runs,
        read_measurements(measured) if measured.is_file() else None,
        reference(
            "isoflop_polyfits",
            "model",
            "context_length",
            "x",
            "isoflop_tag",
            "flops_mean",
            "x_opt",
            "y_opt",
            "a",
            "b",
            "c",
        ),
        reference("power_laws", "model", "context_length", "plot_type", "alpha"),
        reference("tokenparam_slopes", "model", "token_param_ratio", "slope"),
        reference("parametric_fits", *CELL, *NAMES, "objective"),
        reference("runtime_fits", "model", "quantity", "size", "alpha_flops", "beta_bytes"),
    )


def tokenparam(inputs: Inputs, model: str) -> Table:
    """The over-training runs of one family."""
    return inputs.runs[(inputs.runs["model"] == model) & (inputs.runs["experiment"] == "tokenparam")]


def config_of(row: Any) -> xLSTMLargeConfig | TransformerLMConfig:
    """Configuration of the model of a published run."""
    width, heads, blocks, ffn_dim = (int(row[name]) for name in (*SHAPE, "ffn_dim"))
    if row["model"] == "mlstm":
        chunk_size = int(row["chunk_size"])
        return xLSTMLargeConfig(width, heads, blocks, VOCABULARY, ffn_dim=ffn_dim, chunk_size=chunk_size)
    return TransformerLMConfig(width, heads, blocks, VOCABULARY, ffn_dim=ffn_dim)
