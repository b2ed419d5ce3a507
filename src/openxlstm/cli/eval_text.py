"""``openxlstm eval text`` and ``context``: a trained language model on real text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openxlstm.cli.advice import say_if_slow
from openxlstm.cli.options import parse
from openxlstm.runtime import atomic_write_text

MAX_TOKENS = 2**20  # of a text that passages are cut from


@dataclass(frozen=True)
class TextOptions:
    """Perplexity and bits per byte of a model on a text.

    Streamed unless a window is given: every token is predicted from the whole past of its document, in
    constant memory.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory or hub id."""
    text: Annotated[Path, Positional, arg(metavar="TEXT")]
    """A text file (one document), a directory or JSON Lines file (many), or a directory that `openxlstm data`
    prepared (its held-out documents)."""
    window: int | None = None
    """Score in windows of this many tokens that start afresh, instead of streamed."""
    stride: int | None = None
    """Tokens from one window to the next; half a window unless given."""
    max_tokens: int | None = None
    """Stop after this many tokens of text."""
    piece: int = 512
    """Tokens read at once when streamed; bounds the memory."""
    output: Path | None = None
    """Also write the figures to this JSON file."""
    device: str = "auto"
    """Where to run."""
    dtype: str | None = None
    """Numeric type of the weights; as stored unless given."""


@dataclass(frozen=True)
class ContextOptions:
    """How far back a token still matters: loss by position, loss by length of the past, and how a wrong past
    fades."""

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory or hub id."""
    text: Annotated[Path, Positional, arg(metavar="TEXT")]
    """As for `openxlstm eval text`."""
    length: int = 1024
    """Tokens of past that are looked at."""
    rows: int = 16
    """Passages that are averaged over, evenly spread over the first million tokens of the text."""
    output: Path = Path("runs/context")
    """Directory of the figures (context.json) and plots."""
    device: str = "auto"
    """Where to run."""
    dtype: str | None = None
    """Numeric type of the weights; as stored unless given."""


EXAMPLES = {
    "text": """\
  openxlstm eval text runs/demo/model runs/demo/data
  openxlstm eval text runs/demo/model novel.txt --window 1024 --stride 256""",
    "context": "  openxlstm eval context runs/demo/model runs/demo/data --length 1024",
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of the commands."""
    kinds: dict[str, Any] = {"text": (TextOptions, score_text), "context": (ContextOptions, show_context)}
    kind, action = kinds[name]
    action(parse(kind, arguments, command=f"eval {name}", examples=EXAMPLES[name]))
    return 0


def load(model: str, device: str, dtype: str | None = None) -> tuple[Any, Any]:
    """A model with its tokenizer.

    Raises:
        ValueError: it has no tokenizer.
    """
    from openxlstm.checkpoint import load_pretrained

    loaded, tokenizer = load_pretrained(model, device=device, dtype=dtype)
    say_if_slow(next(loaded.parameters()).device)
    if tokenizer is None:
        raise ValueError(f"'{model}' has no tokenizer, which a text needs; save one beside the weights")
    return loaded, tokenizer


def documents_of(path: Path, tokenizer: Any, max_tokens: int | None = None) -> Iterator[Any]:
    """The documents of a text or of prepared data."""
    from openxlstm.evaluation.text import prepared_documents, text_documents

    if not (path / "manifest.json").is_file():
        return text_documents(path, tokenizer, max_tokens=max_tokens)
    from openxlstm.data import TokenDataset

    if TokenDataset.open(path, "validation").tokenizer().to_json() != tokenizer.to_json():
        raise ValueError(
            f"'{path}' was prepared with another tokenizer than the model's; give the text itself"
        )
    documents = prepared_documents(path)
    return documents if max_tokens is None else _at_most(documents, max_tokens)


def _at_most(documents: Iterable[Any], max_tokens: int) -> Iterator[Any]:
    """Whole documents until there are ``max_tokens`` tokens."""
    count = 0
    for document in documents:
        if count >= max_tokens:
            return
        count += sum(len(piece.tokens) for piece in document)
        yield document


def score_text(options: TextOptions, loaded: tuple[Any, Any] | None = None) -> None:
    """Print bits per byte and perplexity, and write them where the options say.

    Args:
        options: of the command.
        loaded: the model and its tokenizer, if they are at hand.
    """
    from openxlstm.evaluation.text import score_stream, score_windows

    if options.stride is not None and options.window is None:
        raise ValueError("--stride goes with --window")
    model, tokenizer = loaded or load(options.model, options.device, options.dtype)
    documents = documents_of(options.text, tokenizer, options.max_tokens)
    if options.window is None:
        score, mode = score_stream(model, tokenizer, documents, piece=options.piece), "streamed"
    else:
        score = score_windows(model, tokenizer, documents, window=options.window, stride=options.stride)
        mode = f"windows of {options.window}"
    figures = {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "nats_per_token": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "tokens_per_second": score.tokens / score.seconds,
        "mode": mode,
        "by_position": score.by_position,
    }
    print(f"{score.bits_per_byte:.4f} bits per byte    perplexity {score.perplexity:.3f} per token")
    print(
        f"{score.tokens:,} tokens, {score.bytes:,} bytes, {score.documents:,} documents, {mode}, "
        f"{score.tokens / score.seconds:,.0f} tokens per second"
    )
    if score.by_position:
        print("\nposition in document   nats per token       tokens")
        for first, loss, count in score.by_position:
            print(f"{f'{first}-{2 * first - 1}':>20}   {loss:>14.4f}   {count:>10,}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(options.output, json.dumps(figures, indent=1))


def show_context(options: ContextOptions, loaded: tuple[Any, Any] | None = None) -> None:
    """Print, write and draw how far back a token still matters; arguments as for :func:`score_text`."""
    from openxlstm.evaluation.context import (
        cut_rows,
        foreign_past,
        half_life,
        loss_by_context,
        loss_by_position,
    )
    from openxlstm.evaluation.text import first_token
    from openxlstm.plots import plot_lines

    if options.length < 64:
        raise ValueError(f"--length must be at least 64, got {options.length}")
    model, tokenizer = loaded or load(options.model, options.device, options.dtype)
    pieces = itertools.chain.from_iterable(documents_of(options.text, tokenizer, MAX_TOKENS))
    tokens = list(itertools.chain.from_iterable(piece.tokens for piece in pieces))
    rows = cut_rows(tokens, options.length, options.rows)
    by_position = loss_by_position(model, rows, first_token(tokenizer)).tolist()
    context = loss_by_context(model, rows)
    half = options.length // 2
    fading = foreign_past(model, rows[:, :half], rows[:, half:])
    life = half_life(fading)
    means = _by_doubling(by_position)
    print("position   nats per token      past kept   nats per token")
    for left, right in itertools.zip_longest(means, zip(context.lengths, context.losses, strict=True)):
        cells = (f"{part[0]:>8}   {part[1]:>14.4f}" if part else " " * 25 for part in (left, right))
        print("       ".join(cells).rstrip())
    print(
        f"\neffective context: {context.effective} tokens (within {context.tolerance:.0%} of the whole)\n"
        f"a wrong past: {fading[0]:.4f} nats apart after one token, {fading[-1]:.2g} after {len(fading)}; "
        f"halved after {life if life is not None else f'more than {len(fading)}'} tokens"
    )
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss_by_position": by_position,
        "context": context._asdict(),
        "foreign_past": fading.tolist(),
        "foreign_past_half_life": life,
    }
    atomic_write_text(output / "context.json", json.dumps(figures))
    y_label = "nats per token"
    plot_lines({"": means}, output / "position.png", x_label="position", y_label=y_label, x_log=True)
    kept = list(zip(context.lengths, context.losses, strict=True))
    plot_lines({"": kept}, output / "past.png", x_label="tokens of past", y_label=y_label, x_log=True)
    faded = [(n + 1, value) for n, value in enumerate(fading.tolist()) if value > 0]
    if faded:
        plot_lines(
            {"": faded},
            output / "wrong_past.png",
            x_label="tokens read since",
            y_label="divergence of predictions (nats)",
            x_log=True,
            y_log=True,
        )
    print(f"plots: {output}")


def _by_doubling(values: Sequence[float]) -> list[tuple[int, float]]:
    """(n, mean of values n to 2 n - 1), counted from 1."""
    starts = [2**n for n in range(len(values).bit_length())]
    parts = [(start, values[start - 1 : 2 * start - 1]) for start in starts]
    return [(start, sum(part) / len(part)) for start, part in parts if part]
