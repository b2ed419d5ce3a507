"""``openxlstm eval long-context``: find, track and count in prompts of any length."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openxlstm.cli.options import parse
from openxlstm.runtime import atomic_write_text

EXAMPLES = """\
  openxlstm eval long-context runs/demo/model novel.txt --lengths 1024 4096
  openxlstm eval long-context NX-AI/xLSTM-7b novel.txt --tasks needle --lengths 131072 --samples 20"""
MAX_FILLER = 8_000_000  # characters of the text that are used as filler


@dataclass(frozen=True)
class LongContextOptions:
    """Let a model find, track and count in long prompts, made from a local text in the manner of RULER.

    Prompts have the requested number of tokens within 2 %; the score is the share of the expected strings
    that the answer contains. The state is carried along the prompt, so memory does not grow with its length.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory or hub id."""
    text: Annotated[Path, Positional, arg(metavar="TEXT")]
    """Text that the prompts are filled with: a file, a directory, or a directory that `openxlstm data`
    prepared (its held-out documents)."""
    tasks: tuple[str, ...] = ()
    """Tasks; all seven unless given."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Lengths of the prompts in tokens."""
    samples: int = 5
    """Prompts per task and length."""
    seed: int = 0
    """Which prompts."""
    output: Path | None = None
    """Also write scores and answers to this JSON file."""
    device: str = "auto"
    """Where to run."""
    dtype: str | None = None
    """Numeric type of the weights; as stored unless given."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command."""
    ask_long(parse(LongContextOptions, arguments, command=f"eval {name}", examples=EXAMPLES))
    return 0


def ask_long(options: LongContextOptions, loaded: tuple[Any, Any] | None = None) -> None:
    """Print a table of scores by task and length, and write it where the options say.

    Args:
        options: of the command.
        loaded: the model and its tokenizer, if they are at hand.
    """
    from openxlstm.cli.eval_text import load
    from openxlstm.evaluation.long_context import LONG_TASKS, get_long_task, run_long_task

    tasks = [get_long_task(task).name for task in options.tasks or LONG_TASKS]
    model, tokenizer = loaded or load(options.model, options.device, options.dtype)
    text = _filler(options.text)
    results = []
    width = max(map(len, tasks))
    print(f"{'task':<{width}}  " + "  ".join(f"{length:>8,}" for length in options.lengths))
    for task in tasks:
        row = []
        for length in options.lengths:
            if sys.stderr.isatty():
                print(f"{task}, {length:,} tokens ...", file=sys.stderr, flush=True)
            found = run_long_task(
                model, tokenizer, task, length, text, samples=options.samples, seed=options.seed
            )
            results.append(found._asdict())
            row.append(f"{found.score:>8.2f}")
        print(f"{task:<{width}}  " + "  ".join(row), flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(options.output, json.dumps(results, indent=1))


def _filler(path: Path) -> str:
    """The beginning of a text, or of the held-out documents of prepared data."""
    from openxlstm.data import TokenDataset, as_source

    if (path / "manifest.json").is_file():
        dataset = TokenDataset.open(path, "validation")
        tokenizer = dataset.tokenizer()
        texts = (tokenizer.decode(dataset.document(n).tolist()) for n in range(dataset.num_documents))
    else:
        texts = as_source(path).documents()
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text[: MAX_FILLER - size])
        size += len(parts[-1])
        if size >= MAX_FILLER:
            break
    return "".join(parts)
