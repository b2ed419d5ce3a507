"""Tables of training runs and of inference measurements: schema, reading, checks.

Training runs, one row each, CSV or Parquet:

    model           str     family, such as "mlstm" or "llama"
    context_length  int     tokens per training sequence
    num_params      float   N, embeddings included
    num_tokens      float   D = batch * context length * steps
    flops           float   C, forward and backward over the whole run, one convention for the whole table
    val_loss        float   nats per token on held-out text

and optionally ``name``, ``experiment``, ``isoflop`` (label of the budget), ``preset_ratio`` (label of D / N),
``flops_convention``, and whatever else a study records. Inference measurements have the dotted columns listed
in :data:`MEASUREMENT_COLUMNS`; times are milliseconds, values that are not positive mean "not measured".
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from openxlstm.config import nearest_name

Table = Any
"""A pandas.DataFrame; its own annotations do not follow selections of rows."""
RUN_COLUMNS = ("model", "context_length", "num_params", "num_tokens", "flops", "val_loss")
MEASUREMENT_COLUMNS = (
    "model.model_type",
    "model.model_tag",
    "input_params.batchsize",
    "input_params.prefill",
    "measured_data.ttft",
    "measured_data.steptime",
    "model_params.num_heads",
    "model_params.embedding_dim",
    "model_params.num_blocks",
    "model_params.ffn_dim",
    "model_params.vocab_size",
    "model_params.chunk_size",
)
CONVENTION_TOLERANCE = (
    0.03  # FLOPs of runs of equal size differ by less: heads and chunk lengths do that much
)


def read_table(path: str | Path, columns: tuple[str, ...]) -> Table:
    """Read a CSV or Parquet file that has ``columns``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, a damaged file, or missing columns, which are named.
        ImportError: pandas, or pyarrow for Parquet, is not installed (``pip install 'openxlstm[scaling]'``).
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"table '{path}' does not exist")
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"'{path}' is neither .csv nor .parquet; save the table as one of them")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as {path.suffix[1:]}: {error}") from None
    missing = [name for name in columns if name not in table.columns]
    if missing:
        hints = "".join(nearest_name(name, table.columns) for name in missing[:1])
        raise ValueError(f"'{path}' lacks the columns {', '.join(missing)}.{hints}")
    if not len(table):
        raise ValueError(f"'{path}' has no rows")
    return table


def read_runs(path: str | Path) -> Table:
    """Read a table of training runs; incomplete ones are left out with a warning that counts them.

    Raises:
        ValueError: see :func:`read_table`; a column that is not numeric, or a value that is not positive.
        FileNotFoundError: there is no such file.
    """
    return check_runs(read_table(path, RUN_COLUMNS), f"'{path}'")


def check_runs(table: Table, where: str = "the table") -> Table:
    """The complete rows of a table of runs; arguments and errors as for :func:`read_runs`."""
    import numpy as np
    import pandas as pd

    table = table.copy()
    numbers = [name for name in RUN_COLUMNS if name != "model"]
    for name in numbers:
        column: Table = pd.to_numeric(table[name], errors="coerce")
        bad = table[name].notna() & column.isna()
        if bad.any():
            value, row = table[name][bad].iloc[0], int(bad.to_numpy().argmax())
            raise ValueError(f"{where}: column {name} holds {value!r} in row {row}, which is not a number")
        table[name] = column.astype(float)
    finite = np.isfinite(table[numbers]).all(axis=1)
    if not finite.all():
        lacking = {name: int((~np.isfinite(table[name])).sum()) for name in numbers}
        counts = ", ".join(f"{name} in {count}" for name, count in lacking.items() if count)
        warnings.warn(
            f"{where}: left out {int((~finite).sum())} of {len(table)} runs without a finite value of "
            f"{counts}",
            stacklevel=3,
        )
        table = table[finite]
    if not len(table):
        raise ValueError(f"{where} has no complete run: every one lacks one of {', '.join(numbers)}")
    for name in numbers:
        if (table[name] <= 0).any():
            raise ValueError(f"{where}: column {name} holds {table[name].min()}; it must be positive")
    return table.reset_index(drop=True)


def check_one_convention(table: Table) -> None:
    """Refuse runs whose FLOPs were counted in different ways, which no fit can mix.

    Seen by the column ``flops_convention``, or by runs of one family, size, context and length of training
    whose FLOPs differ by more than 3 %.

    Raises:
        ValueError: naming the conventions, or two such runs.
    """
    if "flops_convention" in table.columns:
        found = sorted(table["flops_convention"].dropna().unique())
        if len(found) > 1:
            raise ValueError(
                f"the runs count FLOPs by {len(found)} conventions ({', '.join(found)}); fit each by itself, "
                "or recount them with openxlstm.models.accounting"
            )
    for key, group in table.groupby(["model", "context_length", "num_params", "num_tokens"]):
        low, high = group["flops"].min(), group["flops"].max()
        if high > low * (1 + CONVENTION_TOLERANCE):
            model, context, parameters, tokens = key
            raise ValueError(
                f"FLOPs were counted in different ways: runs of {model} with {parameters:.4g} parameters, "
                f"context {context:.0f} and {tokens:.4g} tokens have {low:.4g} and {high:.4g}; "
                "keep one convention"
            )


def require_runs(count: int, needed: int, what: str) -> None:
    """Refuse too few runs.

    Raises:
        ValueError: with the number there is and the number needed.
    """
    if count < needed:
        raise ValueError(f"{what} needs at least {needed} runs, got {count}; add runs or widen the selection")


def read_measurements(path: str | Path) -> Table:
    """Read a table of inference measurements (:data:`MEASUREMENT_COLUMNS`); errors: :func:`read_table`."""
    return read_table(path, MEASUREMENT_COLUMNS)
