"""Prepared tokens as a memory-mapped sequence: :class:`TokenDataset`.

One split is a single sequence of *positions*. A document with ids d0 ... dn-1 has n + 1 of them:

    input     BOS  d0   d1  ...  dn-1
    target    d0   d1   d2  ...  EOS

so the inputs are the targets shifted right, every id and every end of document is predicted once, and nothing
is predicted across documents. The first position of a document is where the recurrent state is reset.
Positions are numbered through all documents in the order of preparation; any window of them can be read
without reading the rest.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_right
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.data.shards import Manifest, ShardInfo, shard_digest, shard_paths


class TokenDataset:
    """One split of a prepared directory, memory-mapped. Made by :meth:`open`.

    ``len(dataset)`` is the number of positions.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest) -> None:
        self.directory = directory
        self.split = split
        self.manifest = manifest
        info = manifest.split(split)
        dtype = manifest.tokenizer.dtype
        self._tokens: list[npt.NDArray] = []
        self._ends: list[npt.NDArray] = []
        self._starts = [0]  # first position of each shard, and the end
        self._first_documents = [0]
        for index, shard in enumerate(info.shards):
            tokens_path, ends_path = shard_paths(directory, split, index)
            self._tokens.append(_mapped(tokens_path, dtype, shard.tokens))
            self._ends.append(_mapped(ends_path, np.dtype("<i8"), shard.documents))
            if int(self._ends[-1][-1]) != shard.tokens:
                raise ValueError(f"'{ends_path}' does not belong to its shard; prepare the data again")
            self._starts.append(self._starts[-1] + shard.tokens)
            self._first_documents.append(self._first_documents[-1] + shard.documents)

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> TokenDataset:
        """Open a split of a directory that :func:`~openxlstm.data.preparation.prepare` wrote.

        Args:
            directory: the prepared directory.
            split: ``"train"`` or ``"validation"``.

        Raises:
            FileNotFoundError: nothing was prepared there, or a shard is missing. ValueError: preparation was
            not finished, the directory is foreign or damaged, or the split is empty.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        info = manifest.split(split)
        if not manifest.complete:
            raise ValueError(
                f"'{directory}' is prepared only in part ({manifest.train.documents} training documents so "
                "far); run the same `openxlstm data` command again to finish it"
            )
        if not info.shards:
            raise ValueError(
                f"'{directory}' has no {split} split; prepare it again with a validation_fraction above 0"
            )
        return cls(directory, split, manifest)

    def __len__(self) -> int:
        """Number of positions: ids and ends of documents."""
        return self._starts[-1]

    def __repr__(self) -> str:
        return (
            f"TokenDataset('{self.directory}', '{self.split}': "
            f"{self.num_documents} documents, {len(self)} positions)"
        )

    @property
    def shards(self) -> list[ShardInfo]:
        """Sizes and digests of the shards."""
        return self.manifest.split(self.split).shards

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._first_documents[-1]

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text in the documents."""
        return self.manifest.split(self.split).text_bytes

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer; a model's may be larger."""
        return self.manifest.tokenizer.vocab_size

    @property
    def max_token_id(self) -> int:
        """The largest id that occurs, as input or target."""
        return max(self.manifest.tokenizer.bos_id, *(shard.max_token_id for shard in self.shards))

    @property
    def fingerprint(self) -> str:
        """A hash of the split's tokens and of the tokenizer."""
        content = f"{self.manifest.tokenizer} {[shard.digest for shard in self.shards]}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was prepared with."""
        return Tokenizer.load(self.directory)

    def bits_per_byte(self, loss: float) -> float:
        """Turn a mean loss per position (nats, over the whole split) into bits per byte of text.

        Ends of documents count as positions but not as bytes, so the figure errs, slightly, against the
        model.
        """
        return loss / math.log(2) * len(self) / self.text_bytes

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """The ids of document ``index``, without end-of-text: int64 (n,).

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"there is no document {index}; the {self.split} split has {self.num_documents}")
        shard = bisect_right(self._first_documents, index) - 1
        local = index - self._first_documents[shard]
        start = int(self._ends[shard][local - 1]) if local else 0
        return self._tokens[shard][start : int(self._ends[shard][local]) - 1].astype(np.int64)

    def read(
        self,
        start: int,
        tokens: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        reset: npt.NDArray[np.bool_],
    ) -> None:
        """Fill the outputs, all (T,), with the positions ``start`` to ``start + T``.

        Args:
            start: first position, 0 <= start <= len(self) - T.
            tokens: receives the inputs.
            targets: receives the targets.
            reset: receives True where a document starts.
        """
        length = len(targets)
        if start < 0 or start + length > len(self):
            raise IndexError(f"positions {start} to {start + length} are outside the {len(self)} there are")
        done = 0
        while done < length:
            shard = bisect_right(self._starts, start + done) - 1
            low = start + done - self._starts[shard]
            count = min(length - done, len(self._tokens[shard]) - low)
            part = slice(done, done + count)
            self._read_shard(shard, low, tokens[part], targets[part], reset[part])
            done += count

    def _read_shard(
        self, shard: int, low: int, tokens: npt.NDArray, targets: npt.NDArray, reset: npt.NDArray
    ) -> None:
        stored, ends = self._tokens[shard], self._ends[shard]
        high = low + len(targets)
        targets[:] = stored[low:high]
        tokens[1:] = targets[:-1]
        if low:
            tokens[0] = stored[low - 1]
        first, last = np.searchsorted(ends, (low, high))
        starts = ends[first:last] - low  # a document starts where the previous one ends
        reset[:] = False
        reset[starts] = True
        tokens[starts] = self.manifest.tokenizer.bos_id
        if low == 0:
            reset[0] = True
            tokens[0] = self.manifest.tokenizer.bos_id

    def verify(self) -> None:
        """Read everything and compare it with the digests in the manifest.

        Raises:
            ValueError: a shard was altered; names the file.
        """
        for index, shard in enumerate(self.shards):
            if shard_digest(self._tokens[index], self._ends[index]) != shard.digest:
                path, _ = shard_paths(self.directory, self.split, index)
                raise ValueError(f"the shard of '{path}' is damaged (its digest differs); prepare it again")


def _mapped(path: Path, dtype: np.dtype, length: int) -> npt.NDArray:
    """Map a file of exactly ``length`` numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing; prepare the data again")
    size = os.path.getsize(path)
    if size != length * dtype.itemsize:
        raise ValueError(
            f"'{path}' has {size} bytes instead of {length * dtype.itemsize}: it is damaged; "
            "prepare the data again"
        )
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))  # a plain view slices faster
