"""``openxlstm data``: text to token shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openxlstm.checkpoint import Tokenizer, byte_tokenizer, train_bpe
from openxlstm.checkpoint.hub import locate_tokenizer
from openxlstm.cli.options import parse
from openxlstm.data import Source, as_source, open_corpus, prepare, python_standard_library
from openxlstm.data.preparation import check_output, check_workers

EXAMPLES = """\
  openxlstm data novels/ --output data/novels                        (a directory of text files)
  openxlstm data corpus.jsonl --text-field body --output data/web --tokenizer EleutherAI/gpt-neox-20b
  openxlstm data src/ --patterns '*.py' '*.md' --output data/code --vocab-size 16384
  openxlstm data --standard-library --output data/python             (nothing to download)"""


@dataclass(frozen=True)
class DataOptions:
    """Turn text into token shards for training.

    Sources are text files, JSON Lines files (.jsonl) or directories, plain or gzipped. Without --tokenizer a
    byte-pair tokenizer is trained on the training split. Documents are split into training and validation by
    their content. The result does not depend on the number of workers, and an interrupted run continues when
    the same command is given again.
    """

    sources: Annotated[tuple[Path, ...], Positional, arg(metavar="SOURCE ...")] = ()
    """Text files, JSON Lines files, or directories."""
    output: Path | None = None
    """Directory to write (required)."""
    standard_library: bool = False
    """Read the Python standard library's own source text."""
    tokenizer: str | None = None
    """A directory with tokenizer.json, a hub id such as EleutherAI/gpt-neox-20b, or "bytes"."""
    vocab_size: int = 8192
    """Size of the tokenizer that is trained when --tokenizer is not given."""
    text_field: str = "text"
    """Field of JSON Lines files that holds the text; a.b descends."""
    patterns: tuple[str, ...] = ("**/*",)
    """Which files of directories to read."""
    separator: str | None = None
    """Text between the documents of text files; without it they are divided at blank lines. The files of a
    directory and the lines of JSON Lines are documents already, so it does not go with them."""
    validation_fraction: float = 0.05
    """Part of the text to hold out, by document."""
    workers: int | None = None
    """Processes that tokenise; default: by the size of the corpus."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(DataOptions, arguments, command="data", examples=EXAMPLES)
    if options.output is None:
        raise ValueError("name a directory to write with --output DIRECTORY; see `openxlstm data --help`")
    if options.tokenizer is None and options.vocab_size < 257:
        raise ValueError(
            f"--vocab-size must be at least 257 (256 bytes, end of text), got {options.vocab_size}"
        )
    if options.separator is not None and options.standard_library:
        raise ValueError("--separator divides text files, it does not go with --standard-library")
    check_workers(options.workers)
    sources: list[Source] = [
        as_source(path, text_field=options.text_field, patterns=options.patterns, separator=options.separator)
        for path in options.sources
    ]
    if options.standard_library:
        sources.append(python_standard_library())
    if not sources:
        raise ValueError("name some text: files, directories, or --standard-library")
    check_output(options.output, sources)
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    progress = sys.stderr.isatty()
    corpus = open_corpus(sources, validation_fraction=options.validation_fraction, progress=progress)
    if tokenizer is None:
        print(f"training a tokenizer of {options.vocab_size} tokens")
        tokenizer = train_bpe(corpus.texts("train"), options.vocab_size)
    manifest = prepare(corpus, options.output, tokenizer, workers=options.workers, progress=progress)
    print(manifest.summary())
    print(f"train on it:  openxlstm train RECIPE.yaml --data.path {options.output}")
    return 0


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by path, hub id or ``"bytes"``.

    Raises:
        FileNotFoundError: no such tokenizer here or on the hub.
        ValueError: it is damaged.
    """
    if name == "bytes":
        return byte_tokenizer()
    return Tokenizer.load(locate_tokenizer(name))
