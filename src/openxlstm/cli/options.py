"""Options of a subcommand: a documented dataclass, parsed by tyro.

The class docstring becomes the introduction of ``--help``, the field docstrings its lines. A mistake is one
``ValueError`` sentence instead of tyro's boxed page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

OptionsT = TypeVar("OptionsT")


def parse(options: type[OptionsT], arguments: Sequence[str], *, command: str, examples: str = "") -> OptionsT:
    """Parse ``arguments`` into the dataclass ``options``.

    Raises:
        ValueError: unknown option, missing argument or ill-typed value, in one sentence.
        SystemExit: ``--help`` was asked for and has been printed.
    """
    captured = io.StringIO()
    program = f"openxlstm {command}"
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                options,
                args=list(arguments),
                prog=program,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as leaving:
        if not leaving.code:
            if examples:
                print(f"examples:\n{examples}")
            raise
        sentence = _sentence(captured.getvalue()) + _nearest_option(options, captured.getvalue())
        raise ValueError(f"{sentence}; see `{program} --help`") from None


@contextlib.contextmanager
def naming_options(options: type) -> Iterator[None]:
    """Let messages about a value, such as "batch_size must be ...", name the option it came from."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        name = message.partition(" must ")[0]
        if name in {field.name for field in dataclasses.fields(options)}:
            message = f"--{name.replace('_', '-')}{message.removeprefix(name)}"
        raise ValueError(message) from None


def _nearest_option(options: type, page: str) -> str:
    """A suggestion for the first unknown option named on ``page``."""
    unknown = re.search(r"Unrecognized options:\s*--([\w-]+)", page)
    if not unknown or not dataclasses.is_dataclass(options):
        return ""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(options)]
    close = difflib.get_close_matches(unknown[1].replace("_", "-"), names, n=1, cutoff=0.5)
    return f". Did you mean --{close[0]}?" if close else ""


def _sentence(page: str) -> str:
    """The message inside tyro's box: what stands between its title and the next rule."""
    page = re.sub(r"\x1b\[[0-9;]*m", "", page)
    title, *lines = [text for line in page.splitlines() if (text := line.strip("│|╭╮╰╯+ "))] or [""]
    kept: list[str] = []
    for line in lines:
        if not line.strip("─-"):
            if kept:
                break
        else:
            kept.append(line)
    message = " ".join(" ".join(kept).split()).partition(" Got errors:")[0]
    if missing := re.fullmatch(r"Missing from (.+?): (.* \(required\))", message):
        arguments = re.findall(r"(--\S+ \S+|\S+) (\S)(.*?)\.? \(required\)", missing[2])
        needed = " and ".join(f"{name} ({first.lower()}{rest})" for name, first, rest in arguments)
        return f"{missing[1]} needs {needed}"
    return message.rstrip(".") or title or "the options could not be understood"
