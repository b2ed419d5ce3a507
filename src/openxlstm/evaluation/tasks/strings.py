"""Counting, and strings whose answer is a string: beyond regular languages.

Tasks of the xLSTM paper (arXiv 2405.04517) after Deletang et al. (arXiv 2207.02098), over small alphabets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks.task import PAD, Lengths, PrefixTask, Task, ask_last
from openxlstm.training.metrics import IGNORED


class Majority(PrefixTask):
    """Bits as 1 and 2; the answer is the one that occurs more often. Odd lengths; ties are not asked."""

    name = "majority"
    summary = "which of two symbols occurs more often"
    vocab_size = 3
    answers = (1, 2)
    step = 2

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        bits = stream.bits(length)
        ahead = np.cumsum(bits.view(np.int8) * np.int8(2) - np.int8(1), axis=1, dtype=np.int16)
        answers = (ahead > 0) + np.int16(1)
        np.copyto(answers, IGNORED, where=ahead == 0)
        return bits + np.uint8(1), answers


class MajorityCount(PrefixTask):
    """Bits as 1 and 2; the answer is how often the more frequent one occurs, as token 2 + count."""

    name = "majority-count"
    summary = "how often the more frequent of two symbols occurs"
    longest = 256
    vocab_size = 3 + 256
    answers = tuple(range(3, 3 + 256))

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        bits = stream.bits(length)
        twos = np.cumsum(bits, axis=1, dtype=np.int16)
        ones = np.arange(1, length + 1, dtype=np.int16) - twos
        return bits + np.uint8(1), np.maximum(twos, ones) + np.int16(2)


class MissingDuplicate(Task):
    """A string twice in a row with one symbol hidden; the answer is that symbol. Even lengths."""

    name = "missing-duplicate"
    summary = "the hidden symbol in a string written twice"
    symbols = 8
    vocab_size = 10
    answers = tuple(range(1, 9))
    shortest = 2
    step = 2
    HIDDEN = 9

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        word = stream.below(self.symbols, int(lengths.max()) // 2) + np.uint8(1)
        at, rows = stream.up_to(lengths), np.arange(len(lengths))
        positions, half = np.arange(2 * word.shape[1]), (lengths // 2)[:, None]
        source = positions + (rows * word.shape[1])[:, None] - half * (positions >= half)
        doubled = word.take(source, mode="clip")  # what comes after the string is no matter
        answers = doubled[rows, at].copy()
        doubled[rows, at] = self.HIDDEN
        return ask_last(doubled, lengths, answers)


class _Rewriting(Task):
    """A string, a separator, then the answer string, asked from the separator on while pads are read."""

    protocols = ("output",)
    symbols: int

    @property
    def separator(self) -> int:
        """Token between the string and the answer."""
        return self.symbols + 1

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        longest = int(lengths.max())
        word = stream.below(self.symbols, longest) + np.uint8(1)
        if (lengths == longest).all():
            answer = self.rewritten(word, lengths)
            tokens = np.zeros((len(word), longest + answer.shape[1]), dtype=np.uint8)
            tokens[:, :longest], tokens[:, longest] = word, self.separator
            targets = np.full(tokens.shape, IGNORED, dtype=np.int16)
            targets[:, longest:] = answer
            return tokens, targets
        word[np.arange(longest) >= lengths[:, None]] = PAD
        rows = np.arange(len(lengths))
        answer = self.rewritten(word, lengths)
        copies = answer.shape[1]
        tokens = np.zeros((len(word), longest + copies), dtype=np.uint8)
        tokens[:, :longest] = word
        tokens[rows, lengths] = self.separator
        targets = np.full(tokens.shape, IGNORED, dtype=np.int16)
        target_at = lengths[:, None] + np.arange(copies)
        np.put_along_axis(targets, target_at, np.where(answer == PAD, IGNORED, answer), axis=1)
        return tokens, targets

    def rewritten(self, word: NDArray[np.uint8], lengths: Lengths) -> NDArray[np.int16]:
        """The answers (B, any), ``PAD`` after the end of each."""
        raise NotImplementedError


class BucketSort(_Rewriting):
    """The string over five symbols, sorted."""

    name = "bucket-sort"
    summary = "sort a string over five symbols"
    symbols = 5
    vocab_size = 7
    answers = (1, 2, 3, 4, 5)

    def rewritten(self, word: NDArray[np.uint8], lengths: Lengths) -> NDArray[np.int16]:
        place = np.arange(word.shape[1], dtype=np.int16)
        rank = np.ones(word.shape, dtype=np.int16)
        end = np.zeros(len(word), dtype=np.int64)
        for symbol in range(1, self.symbols):
            end += (word == symbol).sum(axis=1)
            rank += place >= end[:, None]
        return np.where(place < lengths[:, None], rank, np.int16(PAD))


class ReverseString(_Rewriting):
    """The string backwards."""

    name = "reverse-string"
    summary = "write a string backwards"
    symbols = 2
    vocab_size = 4
    answers = (1, 2)

    def rewritten(self, word: NDArray[np.uint8], lengths: Lengths) -> NDArray[np.int16]:
        if (lengths == word.shape[1]).all():
            return word[:, ::-1].astype(np.int16)
        place = lengths[:, None] - 1 - np.arange(word.shape[1])
        turned = np.take_along_axis(word, np.maximum(place, 0), axis=1)
        return np.where(place >= 0, turned, PAD).astype(np.int16)


class DuplicateString(_Rewriting):
    """The string, twice."""

    name = "duplicate-string"
    summary = "write a string twice"
    symbols = 2
    vocab_size = 4
    answers = (1, 2)

    def rewritten(self, word: NDArray[np.uint8], lengths: Lengths) -> NDArray[np.int16]:
        if (lengths == word.shape[1]).all():
            return np.concatenate([word, word], axis=1).astype(np.int16)
        place = np.arange(2 * word.shape[1])
        twice = np.take_along_axis(word, np.minimum(place % lengths[:, None], word.shape[1] - 1), axis=1)
        return np.where(place < 2 * lengths[:, None], twice, PAD).astype(np.int16)
