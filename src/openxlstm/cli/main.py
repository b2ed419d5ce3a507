"""The ``openxlstm`` command: finds the subcommand, runs it, and turns errors into one clear line.

Subcommands are imported when they run, so ``openxlstm --help`` answers without importing PyTorch.

Exit codes: 0 success, 1 the work failed (missing file, full disk, diverged training, ...), 2 the request
makes no sense (unknown command, option, field or value), 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from openxlstm import __version__

COMMANDS: dict[str, str] = {
    "demo": "train a small model on this machine in a few minutes, compare, plot, generate",
    "data": "turn text, JSONL or a directory of source files into token shards",
    "train": "train a model from a recipe; resume a run",
    "generate": "continue a prompt, or a file of prompts",
    "chat": "talk to a model",
    "eval": "measure state tracking, recall, long context, language modelling; compare networks",
    "convert": "convert a checkpoint between the published layouts",
    "quantize": "write a checkpoint with int8 or int4 weights",
    "inspect": "show what a checkpoint or a recipe's model is made of",
    "plan": "what to train with a budget: size, tokens, loss, time, memory, cost of inference",
    "scaling": "scaling laws: reproduce the published study, run and fit your own",
    "bench": "measure how fast a model writes on this CPU, and what its memory allows",
    "doctor": "show this machine: versions, backends, measured speed",
}

HELP = """usage: openxlstm COMMAND [options]

The xLSTM family in one library: exact, fast recurrent sequence models.

commands:
{commands}

options:
  -h, --help      this text; `openxlstm COMMAND --help` explains a command
  --version       the version
  --debug         show the full stack trace of an error (or set OPENXLSTM_DEBUG=1)

Start with `openxlstm demo`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(os.environ.get("OPENXLSTM_DEBUG"))
    if "--debug" in words:
        words.remove("--debug")
        debug = True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        code = _run(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as interruption:
        note = str(interruption)
        print(f"\nopenxlstm: interrupted{': ' + note if note else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        _drop_output()
        return 1
    except Exception as error:
        if debug:
            raise
        code, line = explain_error(error)
        print(f"openxlstm: error: {line}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_output()
        return code


def _run(words: list[str]) -> int:
    """Run one command; returns its exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:<14}  {summary}" for name, summary in COMMANDS.items())
        print(HELP.format(commands=listing))
        return 0
    if words[0] in ("--version", "-V"):
        print(f"openxlstm {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise ValueError(_unknown_command(words[0]))
    module = importlib.import_module(f"openxlstm.cli.{words[0]}")
    try:
        return module.run(words[1:]) or 0
    except SystemExit as leaving:  # from the option parser, after --help
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)


def _drop_output() -> None:
    """Forget what standard output could not take, so that Python does not try again when it ends."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def explain_error(error: Exception) -> tuple[int, str]:
    """Exit code and a one-line message for ``error``."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return 1, f"the disk is full ({text}); free some space or write elsewhere. Finished files are intact"
    if isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError):
        return 1, _os_error(error, text)
    if isinstance(error, OSError):
        return 1, _os_error(error, text)
    if isinstance(error, ImportError):
        return 1, f"{text}. An optional part is not installed: pip install 'openxlstm[{_extra(error)}]'"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return 1, f"not enough memory ({text[:200]}); use a smaller model, batch or context"
    if isinstance(error, ValueError):
        return 2, text
    if isinstance(error, ArithmeticError):
        return 1, text
    return 1, f"{type(error).__name__}: {text} (unexpected; run again with --debug and please report it)"


def _os_error(error: OSError, text: str) -> str:
    """``strerror: 'file'`` for errors of the operating system, the message itself for our own sentences."""
    if error.strerror and error.filename is not None:
        return f"{error.strerror}: '{error.filename}'"
    return text


def _extra(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    homes = {
        "lm_eval": "eval",
        "transformers": "hf",
        "scipy": "scaling",
        "pandas": "scaling",
        "pyarrow": "scaling",
    }
    return homes.get(package, "train")


def _unknown_command(word: str) -> str:
    close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.4)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"unknown command '{word}'.{hint} Commands: {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
