"""Regular languages: state tracking in its pure form. All have an answer at every prefix.

Tokens and answers follow the published configurations of the xLSTM paper (Beck et al., arXiv 2405.04517)
where it has the task; the group word problems are those of Merrill, Petty and Sabharwal (arXiv 2404.08819).
"""

from __future__ import annotations

import itertools
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks import automaton
from openxlstm.evaluation.tasks.task import PrefixTask


class Parity(PrefixTask):
    """Bits as 1 and 2; the answer is 1 + (number of 2s mod 2)."""

    name = "parity"
    summary = "is the number of ones odd"
    vocab_size = 3
    answers = (1, 2)

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        bits = stream.bits(length)
        return bits + np.uint8(1), np.bitwise_xor.accumulate(bits, axis=1).astype(np.int16) + 1


class EvenPairs(PrefixTask):
    """Bits as 1 and 2; the answer is 2 if "12" and "21" together occur an even number of times, else 1.

    They do exactly if the first and the last bit are equal.
    """

    name = "even-pairs"
    summary = "is the number of changes between neighbours even"
    vocab_size = 3
    answers = (1, 2)
    shortest = 2

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        bits = stream.bits(length)
        return bits + np.uint8(1), (bits == bits[:, :1]).astype(np.int16) + 1


class CycleNavigation(PrefixTask):
    """Steps 0, +1, -1 (tokens 1 to 3) on a cycle of 5; the answer is 4 + position."""

    name = "cycle-navigation"
    summary = "where on a cycle of five do these steps end"
    vocab_size = 9
    answers = (4, 5, 6, 7, 8)
    table = (np.arange(5)[:, None] + np.array([0, 1, -1])) % 5

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        steps = stream.below(3, length)
        return steps + np.uint8(1), automaton.run(self.table, steps) + np.int16(4)


class WordProblem(PrefixTask):
    """Permutations of n things (tokens 1 to n!); the answer is the product so far, the first applied first.

    Args:
        size: n.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.permutations = list(itertools.permutations(range(size)))
        self.name = f"s{size}"
        self.summary = f"product of permutations of {size} things"
        self.vocab_size = len(self.permutations) + 1
        self.answers = tuple(range(1, self.vocab_size))

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """Number of "a, then b" for all pairs, (n!, n!)."""
        numbers = {p: n for n, p in enumerate(self.permutations)}
        rows = [
            [numbers[tuple(b[place] for place in a)] for b in self.permutations] for a in self.permutations
        ]
        return np.array(rows, dtype=np.int64)

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        symbols = stream.below(len(self.permutations), length)
        return symbols + np.uint8(1), automaton.run(self.table, symbols) + np.int16(1)
