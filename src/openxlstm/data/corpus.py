"""A corpus: several sources read as one, with a fixed division into training and validation documents.

**Split.** Each document has a 64-bit hash of its text. With ``validation_fraction`` f, the validation split
is every document whose hash is below a threshold, and the threshold is the one that brings the validation
text closest to f of all bytes (at least one document, never all). So a document's split depends on its text
and on the corpus as a whole, not on order, file names, workers or machine; and equal documents fall on the
same side, so no validation document has been trained on verbatim. Held-out sources of one's own
(``validation_sources``) replace this rule.

**Identity.** The digest is a hash over all documents in order. It tells whether a corpus is still the one
that a directory was prepared from.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from openxlstm.data.sources import Source, as_source

SPLITS = ("train", "validation")
"""The two splits, by name."""

DEFAULT_VALIDATION_FRACTION = 0.05
"""Part of the text that is held out unless told otherwise."""

Sources = Source | str | Path | Iterable[Source | str | Path]
"""One source or several; paths are read as :func:`~openxlstm.data.sources.as_source` says."""


class CorpusDocument(NamedTuple):
    """One document and its place."""

    text: str
    size: int
    """Bytes of UTF-8."""
    split: str
    """``"train"`` or ``"validation"``."""


@dataclass(frozen=True)
class Corpus:
    """A corpus that was read once, so that its size and split are known. Made by :func:`open_corpus`."""

    sources: tuple[Source, ...]
    validation_sources: tuple[Source, ...]
    documents: int
    """Number of documents, both splits."""
    text_bytes: int
    """Bytes of UTF-8 text, both splits."""
    digest: str
    """Hash of all documents in order, and of which were held out by ``validation_sources``."""
    threshold: int
    """Documents of ``sources`` whose hash is below it are validation."""
    validation: str
    """How the split was chosen, in words."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files or lines that were left out, by reason."""

    def read(self) -> Iterator[CorpusDocument]:
        """Yield all documents in order.

        Raises:
            ValueError: at the end, if the text is no longer what :func:`open_corpus` saw.
        """
        running = hashlib.blake2b(digest_size=16)
        for sources, held_out in ((self.sources, False), (self.validation_sources, True)):
            for source in sources:
                for text in source.documents():
                    data = text.encode()
                    key = _hash(data)
                    running.update(key + bytes([held_out]))
                    validation = held_out or int.from_bytes(key, "big") < self.threshold
                    yield CorpusDocument(text, len(data), SPLITS[validation])
        if running.hexdigest() != self.digest:
            raise ValueError(
                "the corpus has changed while it was being read; "
                "delete what was prepared and start again when nothing writes to it"
            )

    def texts(self, split: str) -> Iterator[str]:
        """Yield the texts of one split, in order: exactly the documents that ``prepare`` puts there.

        Use it to train a tokenizer on the training split, or a baseline on the same text.

        Raises:
            ValueError: ``split`` is neither ``"train"`` nor ``"validation"``.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split '{split}'; use 'train' or 'validation'")
        return (document.text for document in self.read() if document.split == split)


def open_corpus(
    sources: Sources,
    *,
    validation_fraction: float | None = None,
    validation_sources: Sources | None = None,
    text_field: str = "text",
    progress: bool = False,
) -> Corpus:
    """Read ``sources`` once, check them, and fix the split.

    Args:
        sources: one source or several; paths are read as :func:`~openxlstm.data.sources.as_source` says.
        validation_fraction: part of the text to hold out, 0 <= f < 1 (default 0.05; 0 holds nothing out).
        validation_sources: sources to hold out instead.
        text_field: the field of JSON Lines files given as paths.
        progress: show how much has been read.

    Returns:
        the corpus; reading it again is checked against this first reading.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: no text at all, a malformed file, a fraction out of range, or too few documents to split.
    """
    if validation_sources is not None and validation_fraction is not None:
        raise ValueError("give validation_sources or validation_fraction, not both")
    fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if validation_sources is not None:
        fraction = 0.0
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and less than 1, got {fraction}")
    training = _listed(sources, text_field)
    held_out = () if validation_sources is None else _listed(validation_sources, text_field)
    if not training:
        raise ValueError("no corpus given; name a text file, a JSON Lines file or a directory")
    for source in (*training, *held_out):
        source.check()
    return _scan(training, held_out, fraction, progress)


def _scan(
    training: tuple[Source, ...], held_out: tuple[Source, ...], fraction: float, progress: bool
) -> Corpus:
    running = hashlib.blake2b(digest_size=16)
    skipped: Counter[str] = Counter()
    hashes, sizes = array("Q"), array("Q")
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for group, is_held_out in ((training, False), (held_out, True)):
            before = len(sizes)
            for source in group:
                for text in source.documents(skipped):
                    data = text.encode()
                    key = _hash(data)
                    running.update(key + bytes([is_held_out]))
                    hashes.append(int.from_bytes(key, "big"))
                    sizes.append(len(data))
                    bar.update(len(data))
            if group and len(sizes) == before:
                raise ValueError(_nothing_found(group, skipped))
    return Corpus(
        sources=training,
        validation_sources=held_out,
        documents=len(sizes),
        text_bytes=sum(sizes),
        digest=running.hexdigest(),
        threshold=_threshold(np.array(hashes, np.uint64), np.array(sizes, np.uint64), fraction),
        validation="separate sources" if held_out else f"fraction {fraction}",
        skipped=dict(sorted(skipped.items())),
    )


def _threshold(hashes: np.ndarray, sizes: np.ndarray, fraction: float) -> int:
    """The hash below which documents are validation; see the module's rule. 0 for a fraction of 0."""
    if fraction == 0:
        return 0
    distinct, place = np.unique(hashes, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError(
            "the corpus is a single document, so none can be held out for validation; give more documents "
            "(or a separator that divides the text), or hold nothing out: validation_fraction=0, on the "
            "command line --validation-fraction 0"
        )
    below = np.cumsum(np.bincount(place, weights=sizes.astype(np.float64)))  # bytes, exact in float64
    taken = int(np.argmin(np.abs(below[:-1] - fraction * below[-1]))) + 1
    return int(distinct[taken])


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _listed(sources: Sources, text_field: str) -> tuple[Source, ...]:
    several: Sequence[Source | str | Path]
    several = [sources] if isinstance(sources, str | Path | Source) else list(sources)
    return tuple(as_source(source, text_field=text_field) for source in several)


def _nothing_found(sources: Sequence[Source], skipped: Counter[str]) -> str:
    names = ", ".join(f"'{source.name}'" for source in sources)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f"the corpus is empty: no text in {names}" + (f" (left out: {left_out})" if left_out else "")
