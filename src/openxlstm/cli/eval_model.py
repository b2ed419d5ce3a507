"""``openxlstm eval model``: everything that is measured of a trained language model, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openxlstm.cli import eval_long_context, eval_text
from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm eval model runs/demo/model runs/demo/data
  openxlstm eval model NX-AI/xLSTM-7b novel.txt --lengths 4096 131072 --samples 20"""


@dataclass(frozen=True)
class ModelOptions:
    """Evaluate a trained language model from end to end.

    Bits per byte, how far back a token still matters, tasks in long prompts, and what its heads do: as `eval
    text`, `eval context`, `eval long-context` and `inspect --text` with their usual settings. Figures and
    plots go into one directory.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory or hub id."""
    text: Annotated[Path, Positional, arg(metavar="TEXT")]
    """As for `openxlstm eval text`; long prompts are filled with it too."""
    output: Path = Path("runs/evaluation")
    """Directory of figures and plots."""
    length: int = 1024
    """Tokens of past that the context measures look at."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Lengths of the long prompts in tokens."""
    samples: int = 5
    """Prompts per task and length."""
    tokens: int = 128
    """Tokens of the text on which the heads are looked at."""
    device: str = "auto"
    """Where to run."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(ModelOptions, arguments, command=f"eval {name}", examples=EXAMPLES)
    from openxlstm.cli.inspect_text import look_inside

    subject, output = [options.model, str(options.text), "--device", options.device], options.output
    print("== text", flush=True)
    eval_text.run("text", [*subject, "--output", str(output / "text.json")])
    print("\n== context", flush=True)
    eval_text.run("context", [*subject, "--length", str(options.length), "--output", str(output / "context")])
    print("\n== long context", flush=True)
    prompts = ["--lengths", *map(str, options.lengths), "--samples", str(options.samples)]
    eval_long_context.run("long-context", [*subject, *prompts, "--output", str(output / "long_context.json")])
    print("\n== inside", flush=True)
    look_inside(options.model, options.text, options.tokens, output / "inside")
    return 0
