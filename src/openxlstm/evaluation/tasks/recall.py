"""Recall: find what was written under a key, copy, complete, and search for the nearest.

Multi-query associative recall is that of Arora et al., Zoology (arXiv 2312.04927), in its published layout;
nearest-neighbour search is the motivating task of the xLSTM paper (arXiv 2405.04517, section 1), on integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks.task import PAD, Lengths, Task, ask_last
from openxlstm.training.metrics import IGNORED


class MultiQueryRecall(Task):
    """Key-value pairs first, then each key once more, in the gaps of a stretch of filler; values are asked
    there.

    Keys are the lower half of the vocabulary (without 0, the pad token), values the upper. Queries stand at
    even distances from the end of the pairs, their places drawn without replacement with a power law that
    favours early ones, p(place) ~ place ** (power - 1).

    Args:
        name: its name.
        pairs: number of pairs.
        vocab_size: tokens, keys and values together.
        power: of the law; 0.01 is published.
        random_filler: fill the other places with random tokens instead of the pad token.
    """

    protocols = ("output",)

    def __init__(
        self,
        name: str,
        pairs: int,
        vocab_size: int = 8192,
        power: float = 0.01,
        *,
        random_filler: bool = False,
    ) -> None:
        self.name, self.pairs, self.vocab_size = name, pairs, vocab_size
        self.power, self.random_filler = power, random_filler
        self.summary = f"recall the values of {pairs} keys out of {vocab_size // 2}"
        self.answers = tuple(range(vocab_size // 2, vocab_size))
        self.shortest, self.step = 4 * pairs, 2

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        half, longest = self.vocab_size // 2, int(lengths.max())
        keys = stream.distinct(half - 1, self.pairs) + 1
        values = half + stream.below(half, self.pairs).astype(np.int64)
        shape = (len(lengths), longest)
        tokens = np.zeros(shape, dtype=np.int64)
        if self.random_filler:
            tokens[:] = stream.below(self.vocab_size, longest)
            tokens[np.arange(longest) >= lengths[:, None]] = PAD
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        at = 2 * self.pairs + 2 * self._places(stream, lengths)
        np.put_along_axis(tokens, at, keys, axis=1)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        np.put_along_axis(targets, at, values, axis=1)
        return tokens, targets

    def _places(self, stream: Stream, lengths: Lengths) -> NDArray[np.int64]:
        """Different places from 0, (B, pairs): the smallest of waiting times with the places' rates.

        That is sampling without replacement in proportion to the rates.
        """
        places = (int(lengths.max()) - 2 * self.pairs) // 2
        rate = np.arange(1, places + 1, dtype=np.float64) ** (self.power - 1)
        waiting = -np.log(stream.uniform(places)) / rate
        waiting[np.arange(places) >= (lengths[:, None] - 2 * self.pairs) // 2] = np.inf
        if places == self.pairs:
            return np.argsort(waiting, axis=1)
        first = np.argpartition(waiting, self.pairs - 1, axis=1)[:, : self.pairs]
        order = np.argsort(np.take_along_axis(waiting, first, axis=1), axis=1)
        return np.take_along_axis(first, order, axis=1)


class Copying(Task):
    """Eight symbols, a wait, a signal; then the symbols are asked in order while pads are read.

    After Hochreiter and Schmidhuber (1997) and Arjovsky et al. (arXiv 1511.06464). The length counts symbols
    and wait.
    """

    name = "copying"
    summary = "repeat eight symbols after a wait"
    protocols = ("output",)
    COUNT = 8
    vocab_size = 10
    answers = tuple(range(1, 9))
    SIGNAL = 9
    shortest = 8

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        word = stream.below(len(self.answers), self.COUNT) + np.uint8(1)
        tokens = np.zeros((len(lengths), int(lengths.max()) + self.COUNT), dtype=np.uint8)
        tokens[:, : self.COUNT] = word
        tokens[np.arange(len(lengths)), lengths] = self.SIGNAL
        targets = np.full(tokens.shape, IGNORED, dtype=np.int16)
        np.put_along_axis(targets, lengths[:, None] + np.arange(self.COUNT), word, axis=1)
        return tokens, targets


class Induction(Task):
    """Random symbols with one marker among them, and the marker again at the end; what followed it is asked.

    Olsson et al. (arXiv 2209.11895). The second marker stands where other tasks have the pad token, so the
    length counts what comes before it.
    """

    name = "induction"
    summary = "what followed this symbol before"
    symbols = 16
    vocab_size = 18
    answers = tuple(range(1, 17))
    MARKER = 17
    shortest = 2

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        rows = np.arange(len(lengths))
        tokens = stream.below(self.symbols, int(lengths.max())) + np.uint8(1)
        at = stream.up_to(lengths - 1)
        answers = tokens[rows, at + 1].copy()
        tokens[rows, at] = self.MARKER
        tokens, targets = ask_last(tokens, lengths, answers)
        tokens[rows, lengths] = self.MARKER
        return tokens, targets


class NearestNeighbour(Task):
    """A reference point, then points with labels; the label of the point nearest to the reference is asked.

    Points are 64 places of a ring (tokens 1 to 64), distances the shorter way round; of two equally near ones
    the first counts. Labels are tokens 65 to 72. The length is 1 + 2 * number of points.
    """

    name = "nearest-neighbour"
    summary = "the label of the point nearest to the first one"
    PLACES = 64
    LABELS = 8
    vocab_size = 1 + 64 + 8
    answers = tuple(range(65, 73))
    shortest = 3
    step = 2

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        count = (int(lengths.max()) - 1) // 2
        reference = stream.below(self.PLACES, 1).astype(np.int64)
        points = stream.below(self.PLACES, count).astype(np.int64)
        labels = stream.below(self.LABELS, count).astype(np.int64) + 1 + self.PLACES
        distance = np.abs(points - reference)
        distance = np.minimum(distance, self.PLACES - distance)
        distance[np.arange(count) >= (lengths[:, None] - 1) // 2] = self.PLACES
        nearest = np.argmin(distance, axis=1)
        tokens = np.concatenate(
            [reference + 1, np.stack([points + 1, labels], axis=2).reshape(-1, 2 * count)], axis=1
        )
        return ask_last(tokens, lengths, labels[np.arange(len(lengths)), nearest])
