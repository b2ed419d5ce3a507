"""``openxlstm generate``: continue a prompt as a stream, or a file of prompts as a batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openxlstm.checkpoint import load_pretrained
from openxlstm.cli.options import parse
from openxlstm.cli.sampling import SamplingOptions
from openxlstm.inference import Generator

EXAMPLES = """\
  openxlstm generate runs/demo/model "def read(" --max-new-tokens 80
  openxlstm generate runs/demo/model "import " --temperature 0            (always the most likely token)
  openxlstm generate runs/demo/model "class A" --state-out a.state        (remember) ...
  openxlstm generate runs/demo/model --state-in a.state                   (... and go on, at no cost)
  openxlstm generate runs/demo/model --prompts prompts.txt > answers.jsonl
  cat story.txt | openxlstm generate MODEL -                              (prompt from standard input)"""


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """Continue a prompt with a language model, as a stream.

    The prompt is read in parallel, then every token costs the same time and memory, however long the text.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory, or an id on the Hugging Face hub."""
    prompt: Annotated[str | None, Positional, arg(metavar="[PROMPT]")] = None
    """Text to continue; "-" reads it from standard input."""
    prompts: Path | None = None
    """A file of prompts to continue as a batch: one per line, or JSON Lines with a field "prompt".
    Prints one JSON object per prompt."""
    only_new: bool = False
    """Print only the new text, not the prompt before it."""
    state_in: Path | None = None
    """Go on from a state that --state-out wrote; a prompt is read in addition."""
    state_out: Path | None = None
    """Write the state after the last token."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(GenerateOptions, arguments, command="generate", examples=EXAMPLES)
    if options.prompts is not None and (options.prompt or options.state_in or options.state_out):
        raise ValueError(
            "--prompts goes with neither a prompt on the command line nor --state-in/--state-out"
        )
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    model, tokenizer = load_pretrained(options.model, dtype=options.dtype, device=options.device)
    if tokenizer is None:
        raise ValueError(f"'{options.model}' has no tokenizer; put a tokenizer.json beside the weights")
    generator = Generator(model, tokenizer)
    if prompts is not None:
        for prompt, result in zip(prompts, generator.complete(prompts, **options.given()), strict=True):
            answer = {"prompt": prompt, "text": result.text, "finish_reason": result.finish_reason}
            print(json.dumps(answer, ensure_ascii=False))
        return 0
    _stream(generator, options)
    return 0


def _stream(generator: Generator, options: GenerateOptions) -> None:
    """One prompt, or the rest of a saved state, piece by piece."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.state_in is not None:
        session = generator.resume(options.state_in)
        if prompt:
            session.feed(prompt)
    else:
        session = generator.start(prompt or "", **options.given())
    if prompt and not options.only_new:
        print(prompt, end="", flush=True)
    for piece in session.stream(**options.given()):
        print(piece, end="", flush=True)
    if options.state_out is None:
        print(session.flush(), flush=True)
    else:
        session.save(options.state_out)  # with the text that is held back, which a resumed run gives out
        print(flush=True)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: lines, or the ``prompt`` fields of JSON Lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no prompts, or a line that is not JSON with a prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompt file '{path}' does not exist")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"'{path}' holds no prompts")
    if path.suffix not in (".jsonl", ".ndjson"):
        return lines
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"'{path}' line {number} is not a JSON object with a field \"prompt\"") from None
    return prompts
