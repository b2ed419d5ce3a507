"""Token shards on disk: the files of a prepared directory, and their manifest.

A prepared directory holds

- ``manifest.json``: format, tokenizer, corpus, settings, and the finished shards with their sizes and
digests;
- ``tokenizer.json``, ``tokenizer_config.json``: the tokenizer, ready for a model saved beside it;
- per split and shard ``train-00000.tokens.bin`` and ``train-00000.ends.bin``.

``tokens`` is the documents' ids one after the other, each document followed by the end-of-text id: little
endian uint16 for vocabularies up to 65,536, else uint32. ``ends`` is int64: ``ends[d]`` is one past document
d's end-of-text in ``tokens``. A document never spans shards.

A shard counts once the manifest lists it; its files are written before. Every file is written under a
temporary name, synced and renamed. So a crash at any moment leaves whole shards and a manifest that describes
them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openxlstm.config import config_from_dict, config_to_dict
from openxlstm.data.corpus import SPLITS
from openxlstm.runtime import atomic_write_bytes, atomic_write_text

FORMAT = "openxlstm-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard."""

    documents: int
    tokens: int
    """Length of the token file: all documents with their end-of-text."""
    text_bytes: int
    """Bytes of UTF-8 text in it."""
    max_token_id: int
    digest: str
    """Hash of both files."""


@dataclass(frozen=True)
class SplitInfo:
    """The finished shards of one split, in order."""

    shards: list[ShardInfo] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens, end-of-text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text."""
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that a directory was prepared with."""

    digest: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @property
    def dtype(self) -> np.dtype:
        """How ids are stored."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class CorpusInfo:
    """The corpus that a directory was prepared from; see :class:`~openxlstm.data.corpus.Corpus`."""

    sources: list[str]
    documents: int
    text_bytes: int
    digest: str
    validation: str
    """How the validation split was chosen: the fraction, or the names of the validation sources."""
    threshold: int
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds."""

    tokenizer: TokenizerInfo
    corpus: CorpusInfo
    shard_tokens: int
    """A shard ends with the document that reaches this many tokens."""
    train: SplitInfo = field(default_factory=SplitInfo)
    validation: SplitInfo = field(default_factory=SplitInfo)
    complete: bool = False
    """False until the last shard is written."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def split(self, name: str) -> SplitInfo:
        """The split called ``name``.

        Raises:
            ValueError: it is neither ``"train"`` nor ``"validation"``.
        """
        if name not in SPLITS:
            raise ValueError(f"there is no split '{name}'; use 'train' or 'validation'")
        return self.train if name == "train" else self.validation

    def summary(self) -> str:
        """A few lines for a person: documents, bytes, tokens and bytes per token of each split."""
        lines = [f"{'':<12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>14}"]
        for name in SPLITS:
            info = self.split(name)
            ratio = info.text_bytes / info.tokens if info.tokens else 0.0
            lines.append(
                f"{name:<12}{info.documents:>12,}{info.text_bytes:>16,}{info.tokens:>16,}{ratio:>14.2f}"
            )
        if self.corpus.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.corpus.skipped.items())
            lines.append(f"left out: {reasons}")
        return "\n".join(lines)

    def write(self, directory: Path) -> None:
        """Replace ``directory/manifest.json`` atomically."""
        atomic_write_text(directory / MANIFEST, json.dumps(config_to_dict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read and check ``directory/manifest.json``.

        Raises:
            FileNotFoundError: no such directory, or nothing was prepared there.
            ValueError: the manifest is damaged, from another program, or from a newer version.
        """
        path = Path(directory) / MANIFEST
        if not path.parent.is_dir():
            raise FileNotFoundError(f"data directory '{directory}' does not exist")
        if not path.is_file():
            raise FileNotFoundError(
                f"no prepared data in '{directory}' (there is no {MANIFEST}); run `openxlstm data` first"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"'{path}' is damaged: {error}; delete the directory and prepare again"
            ) from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(
                f"'{path}' does not describe prepared data of openxlstm; choose another directory"
            )
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"'{directory}' has format version {values.get('format_version')}, this program reads "
                f"{FORMAT_VERSION}; prepare the data again or use the program version that wrote it"
            )
        try:
            return config_from_dict(cls, values)
        except ValueError as error:
            raise ValueError(
                f"'{path}' is damaged: {error}; delete the directory and prepare again"
            ) from None


class ShardBuffer:
    """The shard of one split that is being filled: documents in memory until it is written."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._pieces: list[npt.NDArray] = []
        self._lengths: list[int] = []
        self.tokens = 0
        self._text_bytes = 0

    def append(self, tokens: npt.NDArray, text_bytes: int) -> None:
        """Add a document: its ids, end-of-text included."""
        self._pieces.append(tokens)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)
        self._text_bytes += text_bytes

    def write(self, directory: Path, split: str, index: int) -> ShardInfo:
        """Write the shard's files; the caller lists the result in the manifest."""
        tokens = np.concatenate(self._pieces).astype(self._dtype, copy=False)
        ends = np.cumsum(self._lengths, dtype="<i8")
        tokens_path, ends_path = shard_paths(directory, split, index)
        atomic_write_bytes(tokens_path, tokens.tobytes())
        atomic_write_bytes(ends_path, ends.tobytes())
        return ShardInfo(
            documents=len(self._lengths),
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            max_token_id=int(tokens.max()),
            digest=shard_digest(tokens, ends),
        )


def shard_paths(directory: Path, split: str, index: int) -> tuple[Path, Path]:
    """The token file and the ends file of a shard."""
    return directory / f"{split}-{index:05d}.tokens.bin", directory / f"{split}-{index:05d}.ends.bin"


def shard_digest(tokens: npt.NDArray, ends: npt.NDArray) -> str:
    """The hash by which a shard is recognised."""
    digest = hashlib.blake2b(tokens.data, digest_size=16)
    digest.update(ends.data)
    return digest.hexdigest()
