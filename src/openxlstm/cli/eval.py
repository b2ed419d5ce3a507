"""``openxlstm eval``: what a model can and cannot do, measured. Finds the evaluation and runs it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from openxlstm.config import nearest_name

EVALUATIONS: dict[str, tuple[str, str]] = {
    "state-tracking": (
        "eval_study",
        "the trade-off in one command: sLSTM tracks states, mLSTM recalls (minutes)",
    ),
    "compare": (
        "eval_study",
        "train a set of networks on tasks: equal data, parameters and steps, several seeds",
    ),
    "task": ("eval_study", "train one network on one task with any settings"),
    "model": (
        "eval_model",
        "a trained model from end to end: text, context, long context, a look inside",
    ),
    "text": ("eval_text", "perplexity and bits per byte of a model on any text, streamed or in windows"),
    "context": ("eval_text", "how far back a token still matters to a model, on real text"),
    "long-context": ("eval_long_context", "find, track and count in prompts of any length, from local text"),
    "harness": ("eval_harness", "lm-evaluation-harness, with states shared between prompts and answers"),
    "tasks": ("eval_study", "list the tasks and networks"),
}
"""Name -> module of the command line, one line of help."""

HELP = """usage: openxlstm eval EVALUATION [options]

Measure what a model can and cannot do.

evaluations:
{evaluations}

`openxlstm eval EVALUATION --help` explains each one.

examples:
  openxlstm eval state-tracking --output runs/state-tracking
  openxlstm eval task parity --model slstm
  openxlstm eval model runs/demo/model runs/demo/data"""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<14}  {summary}" for name, (_, summary) in EVALUATIONS.items())
        print(HELP.format(evaluations=lines))
        return 0
    name, *rest = arguments
    if name not in EVALUATIONS:
        hint = nearest_name(name, EVALUATIONS)
        raise ValueError(f"unknown evaluation '{name}'.{hint} Evaluations: {', '.join(EVALUATIONS)}")
    module = importlib.import_module(f"openxlstm.cli.{EVALUATIONS[name][0]}")
    return module.run(name, rest)
