"""``openxlstm chat``: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openxlstm.checkpoint import load_pretrained
from openxlstm.cli.advice import say_if_slow
from openxlstm.cli.options import parse
from openxlstm.cli.sampling import SamplingOptions
from openxlstm.inference import TEMPLATES, Chat, Generator, SamplingConfig

EXAMPLES = """\
  openxlstm chat NX-AI/xLSTM-7b --dtype bfloat16
  openxlstm chat runs/demo/model --template plain"""


@dataclass(frozen=True)
class ChatOptions(SamplingOptions):
    """Talk to a language model.

    The model's state is kept from turn to turn, so a turn costs what its own words cost, however long the
    conversation. /help lists the commands; Ctrl-C ends an answer, the end of input the conversation.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory, or an id on the Hugging Face hub."""
    template: Literal["transcript", "plain"] = "transcript"
    """transcript writes the two sides down like a play; plain lets the model continue what you type."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(ChatOptions, arguments, command="chat", examples=EXAMPLES)
    sampling = SamplingConfig().updated(**options.given())
    model, tokenizer = load_pretrained(options.model, dtype=options.dtype, device=options.device)
    if tokenizer is None:
        raise ValueError(f"'{options.model}' has no tokenizer; put a tokenizer.json beside the weights")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        print("/help lists the commands")

    def read() -> str | None:
        try:
            return input("> " if interactive else "")
        except EOFError:
            return None

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    generator = Generator(model, tokenizer)
    say_if_slow(generator.runner.device)
    Chat(generator, sampling, TEMPLATES[options.template], read=read, write=write).run()
    return 0
