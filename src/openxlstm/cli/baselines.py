"""What a language model has to beat: classical compressors and a byte 5-gram, in bits per byte.

All of them read the same held-out bytes.

* ``gzip -9`` and ``xz -9``: the held-out documents joined into one stream and compressed by Python's own
  modules; bits per byte = 8 * compressed size / size. They have no training text, but they adapt to the
  held-out text as they read it, across document borders, which n-gram and model do not.
* The byte n-gram is trained on the training documents with interpolated modified Kneser-Ney smoothing
  (Chen and Goodman, 1999). For a context ``h`` and the next byte ``w``, with ``h'`` the context without its
  oldest byte,

      P(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + gamma(h) P(w | h')

  where ``c`` counts occurrences at the highest order and distinct preceding bytes below it, ``D`` is one of
  three discounts estimated from the counts of counts, and ``gamma`` gives away exactly what the discounts
  took. The recursion ends in the uniform distribution over 256 bytes, so every text has a probability.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]


def gzip_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of ``gzip -9`` on the joined documents."""
    text = b"".join(documents)
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of ``xz -9`` on the joined documents."""
    text = b"".join(documents)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


class ByteNGram:
    """A byte n-gram model with interpolated modified Kneser-Ney smoothing.

    Args:
        documents: training documents; contexts do not cross from one into the next.
        order: 5 means four bytes of context; between 1 and 7.

    Raises:
        ValueError: no training text, or an order outside 1 to 7.
    """

    def __init__(self, documents: Sequence[bytes], order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"the order of a byte n-gram must be between 1 and 7, got {order}")
        if not any(documents):
            raise ValueError("a byte n-gram needs training text, got none")
        self.order = order
        keys, counts = np.unique(_windows(documents, order), return_counts=True)
        tables: list[_Table] = []
        for length in range(order, 0, -1):
            tables.append(_Table(keys, counts))
            # Below the highest order an n-gram counts as often as there are distinct symbols before it.
            keys, counts = np.unique(_suffix(keys, length - 1), return_counts=True)
        self._tables = tables[::-1]  # lowest order first

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Average code length of ``documents`` in bits per byte, every byte predicted."""
        windows = _windows(documents, self.order)
        probability = np.full(len(windows), 1 / 256)
        for length, table in enumerate(self._tables, start=1):
            probability = table.interpolate(_suffix(windows, length), probability)
        return float(-np.log2(probability).mean())


class _Table:
    """Counts of one order and, from them, one step of the interpolation."""

    def __init__(self, keys: UInt64, counts: NDArray[np.int64]) -> None:
        self.keys = keys
        self.counts = counts
        self.discount = _discounts(counts)
        contexts, first = np.unique(keys >> np.uint64(9), return_index=True)
        self.contexts = contexts
        self.totals = np.add.reduceat(counts, first)
        removed = self.discount[np.minimum(counts, 3)]
        self.gamma = np.add.reduceat(removed, first) / self.totals

    def interpolate(self, grams: UInt64, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """``P(w | h)`` for each n-gram, given ``P(w | h')``. An unseen context passes ``lower`` through."""
        position = np.minimum(np.searchsorted(self.keys, grams), len(self.keys) - 1)
        count = np.where(self.keys[position] == grams, self.counts[position], 0)
        context = grams >> np.uint64(9)
        row = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        seen = self.contexts[row] == context
        kept = np.maximum(count - self.discount[np.minimum(count, 3)], 0) / self.totals[row]
        return np.where(seen, kept + self.gamma[row] * lower, lower)


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Discounts for counts 0 (none), 1, 2 and 3 or more, from the counts of counts."""
    n1, n2, n3, n4 = (max(int(np.count_nonzero(counts == c)), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimate = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(estimate, [0.0, 0.1, 0.1, 0.1], [0.0, 0.95, 1.9, 2.85])


def _windows(documents: Sequence[bytes], order: int) -> UInt64:
    """One n-gram per byte, an integer of nine bits per symbol; symbol 256 precedes a document."""
    parts: list[UInt64] = []
    for document in documents:
        symbols = np.full(len(document) + order - 1, 256, dtype=np.uint64)
        symbols[order - 1 :] = np.frombuffer(document, dtype=np.uint8)
        window = np.zeros(len(document), dtype=np.uint64)
        for offset in range(order):
            window = (window << np.uint64(9)) | symbols[offset : offset + len(document)]
        parts.append(window)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _suffix(grams: UInt64, length: int) -> UInt64:
    """The last ``length`` symbols of each n-gram."""
    return grams & np.uint64((1 << (9 * length)) - 1)
