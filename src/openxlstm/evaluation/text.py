"""Perplexity and bits per byte of a language model on any text.

    perplexity    = exp(nats / tokens)
    bits per byte = nats / (ln 2 * bytes)           comparable between tokenizers and with gzip

* Streamed (:func:`score_stream`): every token is predicted from the whole past of its document. The state is
  carried from piece to piece, so time is linear and memory constant however long the document is.
* Windowed (:func:`score_windows`): the usual protocol for models with a limited context. Windows of
  ``window`` tokens start afresh every ``stride`` tokens, and each token counts once, in the first window that
  holds it, so it sees at least ``window - stride`` tokens of its past.

Each document starts from the empty state with the beginning-of-sequence token, if the tokenizer has one;
without one its first token cannot be predicted and is not counted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from openxlstm.checkpoint import Tokenizer
from openxlstm.data import TokenDataset, as_source
from openxlstm.data.sources import TextFile
from openxlstm.models import LanguageModel
from openxlstm.training.metrics import IGNORED, summed_cross_entropy

PIECE = 512
ROWS = 8  # windows that are read at once


class Piece(NamedTuple):
    """A part of a document."""

    tokens: list[int]
    bytes: int
    """Bytes of text the tokens stand for."""


Document = Iterable[Piece]
"""The pieces of a document, in order; without beginning-of-sequence token."""


class TextScore(NamedTuple):
    """How well a model predicts a text."""

    tokens: int
    """Tokens predicted."""
    bytes: int
    """Bytes of text they stand for; ends of documents are tokens of no bytes."""
    documents: int
    nats: float
    """Sum of the negative log probabilities."""
    seconds: float
    by_position: tuple[tuple[int, float, int], ...]
    """(n, mean nats, tokens) for positions n to 2 n - 1 in their documents, counted from 1; streamed only."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats / (math.log(2) * self.bytes)


# ---------------------------------------------------------------------- documents


def text_documents(
    path: str | Path, tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> Iterator[Document]:
    """The documents of a text file (one), a directory or JSON Lines file (many), in pieces of constant size.

    Pieces end at line ends where there are any, and are encoded one by one: at their borders a tokenizer may
    cut differently than in the whole text, which errs against the model and changes no byte.

    Args:
        path: what to read; see :func:`openxlstm.data.as_source`.
        tokenizer: encodes it.
        max_tokens: stop after that many tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or ``max_tokens`` below 1.
    """
    source = as_source(path)
    whole = isinstance(source, TextFile)
    texts: Iterator[str] = source.documents()
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    left = [math.inf if max_tokens is None else max_tokens]

    def pieces(parts: Iterable[str]) -> Iterator[Piece]:
        for text in parts:
            if left[0] <= 0:
                return
            tokens = tokenizer.encode(text, bos=False)
            if len(tokens) <= left[0]:
                yield Piece(tokens, len(text.encode()))
            else:
                tokens = tokens[: int(left[0])]
                yield Piece(tokens, len(tokenizer.decode(tokens, skip_special=False).encode()))
            left[0] -= len(tokens)

    if whole:
        yield pieces(texts)
        return
    for text in texts:
        if left[0] <= 0:
            return
        yield list(pieces([text]))


def prepared_documents(directory: str | Path, *, split: str = "validation") -> Iterator[Document]:
    """The documents of a split that ``openxlstm data`` prepared, each with its end as last token.

    Raises:
        FileNotFoundError: not prepared data.
        ValueError: the split is empty.
    """
    dataset = TokenDataset.open(directory, split)
    tokenizer = dataset.tokenizer()
    for index in range(dataset.num_documents):
        tokens = dataset.document(index).tolist()
        size = len(tokenizer.decode(tokens, skip_special=False).encode())
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        yield [Piece([*tokens, *end], size)]


# ---------------------------------------------------------------------- scoring


def score_stream(
    model: nn.Module, tokenizer: Tokenizer, documents: Iterable[Document], *, piece: int = PIECE
) -> TextScore:
    """Score documents with the state carried through each.

    Args:
        model: a language model with states.
        tokenizer: of the model; says whether a document begins with a token of its own.
        documents: what to score.
        piece: tokens read at once; bounds the memory.

    Raises:
        ValueError: the model has no step mode, there is nothing to score, or ``piece`` is not positive.
    """
    require_states(model)
    if piece < 1:
        raise ValueError(f"piece must be at least 1 token, got {piece}")
    total, counted, size, number = 0.0, 0, 0, 0
    bins: dict[int, list[float]] = {}
    start = time.perf_counter()
    with evaluating(model):
        for document in documents:
            previous, state, position = first_token(tokenizer), None, 0
            number += 1
            for tokens, length in _regrouped(document, piece):
                if not tokens:
                    continue
                if previous is None:  # nothing to predict the very first token from
                    previous, tokens = tokens[0], tokens[1:]
                    length -= len(tokenizer.decode([previous], skip_special=False).encode())
                    position = 1
                    if not tokens:
                        continue
                losses, state = token_losses(model, [previous, *tokens[:-1]], tokens, state)
                for place, loss in _bins(losses, position):
                    entry = bins.setdefault(place, [0.0, 0])
                    entry[0], entry[1] = entry[0] + float(loss.sum()), entry[1] + loss.numel()
                total, counted, size = total + float(losses.sum()), counted + len(tokens), size + length
                position, previous = position + len(tokens), tokens[-1]
    _require_text(counted)
    positions = tuple((2**k, entry[0] / entry[1], int(entry[1])) for k, entry in sorted(bins.items()))
    return TextScore(counted, max(size, 1), number, total, time.perf_counter() - start, positions)


def token_losses(
    model: nn.Module, inputs: list[int], targets: list[int], state: Any
) -> tuple[torch.Tensor, Any]:
    """Nats of each target (T,), float64, and the state after the inputs (batch of 1)."""
    device = next(model.parameters()).device
    tokens = torch.tensor([inputs], dtype=torch.long, device=device)
    logits, state = model(tokens, state, return_state=True)
    wanted = torch.tensor(targets, dtype=torch.long, device=device)
    losses = torch.nn.functional.cross_entropy(logits[0].float(), wanted, reduction="none")
    return losses.double().cpu(), state


def _bins(losses: torch.Tensor, position: int) -> Iterator[tuple[int, torch.Tensor]]:
    """``losses`` of positions from ``position`` (from 0), cut where position + 1 is a power of two."""
    start = 0
    while start < len(losses):
        place = (position + start + 1).bit_length() - 1
        stop = min(len(losses), 2 ** (place + 1) - 1 - position)
        yield place, losses[start:stop]
        start = stop


def _regrouped(document: Document, size: int) -> Iterator[Piece]:
    """The document in pieces of at most ``size`` tokens; bytes are counted with the last part of a piece."""
    for tokens, length in document:
        for start in range(0, len(tokens), size):
            yield Piece(tokens[start : start + size], length if start + size >= len(tokens) else 0)


def score_windows(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    window: int,
    stride: int | None = None,
) -> TextScore:
    """Score documents in windows that start afresh.

    Args:
        model: any model from tokens (B, T) to logits (B, T, V).
        tokenizer: of the model.
        documents: what to score.
        window: tokens a window predicts at most.
        stride: tokens from one window to the next; None is half a window, ``window`` means no overlap.

    Raises:
        ValueError: a stride that is not between 1 and the window, or no document as long as the window.
    """
    stride = max(1, window // 2) if stride is None else stride
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie between 1 and the window of {window} tokens, got {stride}")
    total, counted, size, number, longest = 0.0, 0, 0, 0, 0
    start = time.perf_counter()
    with evaluating(model):
        for document in documents:
            number += 1
            seen = [0, 0]
            rows = _windows(document, tokenizer, window, stride, seen)
            while batch := list(itertools.islice(rows, ROWS)):
                for _, group in itertools.groupby(batch, key=lambda row: len(row[0])):
                    nats, tokens = _score_rows(model, list(group))
                    total, counted = total + nats, counted + tokens
            longest, size = max(longest, seen[0]), size + seen[1]
    if longest < window:
        raise ValueError(
            f"the text has {longest} tokens, fewer than the window of {window}; "
            "use a window no longer than the text, or score it streamed"
        )
    _require_text(counted)
    return TextScore(counted, max(size, 1), number, total, time.perf_counter() - start, ())


def _windows(
    document: Document, tokenizer: Tokenizer, window: int, stride: int, seen: list[int]
) -> Iterator[tuple[list[int], int]]:
    """(inputs and targets of a window in one list of up to window + 1 tokens, how many targets count).

    ``seen`` receives the number of tokens that can be predicted, and their bytes.
    """
    first = first_token(tokenizer)
    kept: list[int] = [] if first is None else [first]  # the part of the text that windows still need
    counted = 0  # targets in `kept` that have been counted already; they stand at its beginning
    for tokens, length in document:
        if not tokens:
            continue
        if first is None:
            length -= len(tokenizer.decode(tokens[:1], skip_special=False).encode())
            first = tokens[0]
            seen[0] -= 1
        kept += tokens
        seen[0], seen[1] = seen[0] + len(tokens), seen[1] + length
        while len(kept) > window + 1:  # more follows, so this window is full
            yield kept[: window + 1], window - counted
            kept, counted = kept[stride:], window - stride
    if len(kept) > 1 + counted:
        yield kept, len(kept) - 1 - counted


def _score_rows(model: nn.Module, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Summed nats and number of the counted targets of windows of equal length."""
    tokens = torch.tensor([row for row, _ in rows], dtype=torch.long, device=next(model.parameters()).device)
    targets = tokens[:, 1:].clone()
    for index, (_, new) in enumerate(rows):
        targets[index, : targets.shape[1] - new] = IGNORED
    return float(summed_loss(model, tokens[:, :-1], targets)), int((targets != IGNORED).sum())


def summed_loss(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats over the targets that count: tokens and targets (B, T) -> scalar.

    The models of this library never hold all logits at once for it.
    """
    if isinstance(model, LanguageModel):
        return model.summed_loss(tokens, targets)
    return summed_cross_entropy(model(tokens), targets)


def first_token(tokenizer: Tokenizer) -> int | None:
    """The token that every document begins with, if there is one."""
    return tokenizer.bos_id if tokenizer.add_bos else None


def require_states(model: nn.Module) -> None:
    """Refuse a model that cannot carry a state.

    Raises:
        ValueError: naming the model.
    """
    if not all(hasattr(model, name) for name in ("initial_state", "step")):
        raise ValueError(
            f"a {type(model).__name__} has no step mode, so its state cannot be carried along a text; "
            "score it in windows"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _require_text(counted: int) -> None:
    if not counted:
        raise ValueError("there is no text to score: it is empty, or one token long without a first token")
