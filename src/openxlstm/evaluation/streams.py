"""Random numbers addressed by (seed, task, split, index): the same sample whoever asks for it, and in any
batch.

A sample's numbers are a pure function of its address: a keyed counter goes through the finaliser of
SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014), so a batch is a few
array operations, nothing is drawn in sequence, and no worker needs to know what the others did.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SMALL = 128  # up to this many symbols, 16 random bits per symbol are enough
SPLITS = ("train", "validation", "test")


def mix(words: UInt64) -> UInt64:
    """SplitMix64's finaliser, in place: every input bit flips every output bit with probability one half."""
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(words, np.uint64(27), out=shifted)
    words ^= shifted
    words *= np.uint64(0x94D049BB133111EB)
    np.right_shift(words, np.uint64(31), out=shifted)
    words ^= shifted
    return words


class Stream:
    """The random numbers of samples ``indices`` of one split of one task.

    Each call draws fresh numbers: the n-th call of a stream gives sample i the same numbers in every batch,
    as long as the calls before it were the same in kind and order.

    Args:
        task: name of the task.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        indices: numbers of the samples, any integers from 0, shape (B,).
        seed: any integer; different seeds are different data sets.

    Raises:
        ValueError: an unknown split or a negative index.
    """

    def __init__(self, task: str, split: str, indices: Any, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        numbers = np.asarray(indices, dtype=np.int64)
        if numbers.ndim != 1 or (numbers.size and int(numbers.min()) < 0):
            raise ValueError("indices must be a flat list of sample numbers from 0")
        digest = hashlib.blake2b(f"{seed}/{task}/{split}".encode(), digest_size=8).digest()
        with np.errstate(over="ignore"):
            self._keys = mix(np.frombuffer(digest, np.uint64)[0] + numbers.astype(np.uint64) * GOLDEN)
        self._draws = 0

    def __len__(self) -> int:
        return len(self._keys)

    def words(self, count: int) -> UInt64:
        """``count`` random words per sample, (B, count)."""
        self._draws += 1
        with np.errstate(over="ignore"):
            keys = mix(self._keys + np.uint64(self._draws) * np.uint64(0xD1342543DE82EF95))
            counters = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
            return mix(keys[:, None] + counters)

    def bits(self, count: int) -> NDArray[np.uint8]:
        """Fair bits, (B, count) of 0 and 1."""
        words = self.words(-(-count // 64))
        return np.unpackbits(words.view(np.uint8), axis=1, count=count)

    def below(self, limit: int, count: int) -> NDArray[Any]:
        """Integers from 0 to ``limit - 1``, (B, count): uint8 for up to 128 symbols, else int64.

        Probabilities differ from 1 / limit by less than 2**-16 (up to 128 symbols) or 2**-32.
        """
        if limit == 2:
            return self.bits(count)
        if limit <= SMALL:
            lanes = self.words(-(-count // 4)).view(np.uint16)[:, :count]
            return (np.multiply(lanes, limit, dtype=np.uint32) >> np.uint32(16)).astype(np.uint8)
        lanes = self.lanes(count)[:, :count]
        return (np.multiply(lanes, limit, dtype=np.uint64) >> np.uint64(32)).astype(np.int64)

    def lanes(self, count: int) -> NDArray[np.uint32]:
        """At least ``count`` random numbers of 32 bits per sample, (B, ``count`` or one more), contiguous."""
        return self.words(-(-count // 2)).view(np.uint32)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1), (B, count)."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def up_to(self, limits: NDArray[Any]) -> NDArray[np.int64]:
        """One integer from 0 to ``limits - 1`` for each sample, (B,)."""
        lanes = self.words(1)[:, 0] >> np.uint64(32)
        return ((lanes * limits.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def distinct(self, limit: int, count: int) -> NDArray[np.int64]:
        """``count`` different integers from 0 to ``limit - 1``, in random order, (B, count).

        What an earlier entry has already is drawn again until all differ. The procedure treats all values
        alike, so all ordered choices are equally likely.

        Raises:
            ValueError: there are not that many.
        """
        if count > limit:
            raise ValueError(f"cannot choose {count} different values out of {limit}")
        rounds = Stream.__new__(Stream)  # how many rounds it takes depends on the batch, later draws must not
        rounds._keys, rounds._draws = self.words(1)[:, 0], 0
        values = rounds.below(limit, count).astype(np.int64)
        rows = np.arange(len(values))
        while rows.size:
            drawn = rounds.below(limit, count)
            part = values[rows]
            order = np.argsort(part, axis=1, kind="stable")
            ordered = np.take_along_axis(part, order, axis=1)
            repeated = np.zeros(part.shape, dtype=bool)
            np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            again = repeated.any(axis=1)
            rows, repeated = rows[again], repeated[again]
            values[rows] = np.where(repeated, drawn[rows], values[rows])
        return values
