"""``openxlstm eval model``: everything that is measured of a trained language model, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openxlstm.cli.eval_long_context import LongContextOptions, ask_long
from openxlstm.cli.eval_text import ContextOptions, TextOptions, load, score_text, show_context
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
    dtype: str | None = None
    """Numeric type of the weights; as stored unless given."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(ModelOptions, arguments, command=f"eval {name}", examples=EXAMPLES)
    from openxlstm.cli.inspect_text import look_inside

    model, text, output = options.model, options.text, options.output
    loaded = load(model, options.device, options.dtype)
    print("== text", flush=True)
    score_text(TextOptions(model, text, output=output / "text.json"), loaded)
    print("\n== context", flush=True)
    show_context(ContextOptions(model, text, length=options.length, output=output / "context"), loaded)
    print("\n== long context", flush=True)
    prompts = {"lengths": options.lengths, "samples": options.samples}
    ask_long(LongContextOptions(model, text, **prompts, output=output / "long_context.json"), loaded)
    print("\n== inside", flush=True)
    look_inside(model, text, options.tokens, output / "inside", loaded)
    return 0
