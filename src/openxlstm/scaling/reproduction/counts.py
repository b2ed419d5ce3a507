"""Parameters and FLOPs of every published run, counted from its configuration."""

from __future__ import annotations

from openxlstm.models import parameter_count
from openxlstm.models.accounting import Counting, training_flops_per_token
from openxlstm.scaling.report import Report
from openxlstm.scaling.reproduction.checks import Check
from openxlstm.scaling.reproduction.inputs import Inputs, config_of


def count_runs(report: Report, inputs: Inputs) -> list[Check]:
    """Count every run that has FLOPs, also those without a loss."""
    parameters: list[float] = []
    flops: list[float] = []
    for _, row in inputs.all_runs.iterrows():
        config, context = config_of(row), int(row["context_length"])
        chinchilla = row["experiment"] == "isoflop_chinchilla_extra"
        counting = Counting(attention="chinchilla" if chinchilla else "distill")
        tokens = row["global_batch_size"] * context * row["num_steps"]
        counted = training_flops_per_token(config, context, counting) * tokens
        parameters.append(abs(parameter_count(config) / row["num_params"] - 1))
        flops.append(abs(counted / row["flops"] - 1))
    checks = [
        Check("parameters of runs, relative", len(parameters), max(parameters), 1e-9),
        Check("FLOPs of runs, relative", len(flops), max(flops), 1e-9),
    ]
    report.heading("Parameters and FLOPs")
    report.table(
        ("quantity", "runs", "largest relative difference"),
        [("parameters", len(parameters), max(parameters)), ("FLOPs", len(flops), max(flops))],
        "Counted from the configuration of every complete run",
    )
    return checks
