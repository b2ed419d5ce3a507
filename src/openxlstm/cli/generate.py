"""``openxlstm generate``: continue a prompt as a stream, or a file of prompts as a batch."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openxlstm.checkpoint import load_pretrained
from openxlstm.cli.advice import say_if_slow
from openxlstm.cli.options import parse
from openxlstm.cli.sampling import SamplingOptions
from openxlstm.inference import Generator, Session

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
    """A file of prompts to continue as a batch: one per line, or JSON Lines with a field "prompt"
    that holds a text or a list of token ids.
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
    if options.state_out is not None:
        _check_writable(options.state_out)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    model, tokenizer = load_pretrained(options.model, dtype=options.dtype, device=options.device)
    if tokenizer is None:
        raise ValueError(f"'{options.model}' has no tokenizer; put a tokenizer.json beside the weights")
    generator = Generator(model, tokenizer)
    say_if_slow(generator.runner.device)
    if prompts is not None:
        for prompt, result in zip(prompts, generator.complete(prompts, **options.given()), strict=True):
            answer = {"prompt": prompt, "text": result.text, "finish_reason": result.finish_reason}
            print(json.dumps(answer, ensure_ascii=False))
        return 0
    _stream(generator, options)
    return 0


def _check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold."""
    if path.is_dir():
        raise IsADirectoryError(f"--state-out '{path}' is a directory; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--state-out '{path}': there is no directory '{path.parent}'; make it first")


def _stream(generator: Generator, options: GenerateOptions) -> None:
    """One prompt, or the rest of a saved state, piece by piece."""
    prompt = _read_standard_input() if options.prompt == "-" else options.prompt
    if options.state_in is not None:
        session = generator.resume(options.state_in)
        if prompt:
            session.feed(prompt)
    else:
        session = generator.start(prompt or "", **options.given())
    try:
        _write(session, "" if options.only_new else prompt or "", options)
    except Exception:
        with contextlib.suppress(OSError):
            print(flush=True)  # so that the message does not continue the text
        raise


def _write(session: Session, prompt: str, options: GenerateOptions) -> None:
    """Print ``prompt`` and what the session writes after it; save the state if that was asked for."""
    print(prompt, end="", flush=True)
    for piece in session.stream(**options.given()):
        print(piece, end="", flush=True)
    if options.state_out is None:
        print(session.flush(), flush=True)
    else:
        session.save(options.state_out)  # with the text that is held back, which a resumed run gives out
        print(flush=True)


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"the text on standard input is not {error.encoding.upper()}; convert it") from None


def read_prompts(path: Path) -> list[str | list[int]]:
    """The prompts in a file: lines, or the ``prompt`` fields of JSON Lines. Blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not UTF-8, no prompts, or a line that is not JSON with a prompt; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompt file '{path}' does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text; convert it to UTF-8 first") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"'{path}' holds no prompts")
    if path.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in lines]
    return [_prompt_of(line, f"'{path}' line {number}") for number, line in lines]


def _prompt_of(line: str, where: str) -> str | list[int]:
    try:
        prompt: Any = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{where} is not a JSON object with a field "prompt"') from None
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
        raise ValueError(f'{where}: "prompt" must be a text or a list of token ids, got {prompt!r:.80}')
    return prompt
