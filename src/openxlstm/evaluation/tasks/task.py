"""What every task is: a set of strings with answers, addressed by number.

    batch = task.batch("train", range(256), lengths=(3, 40), protocol="last")
    batch.tokens   (B, T) int64, 0 is the pad token
    batch.targets  (B, T) int64, IGNORED (-100) wherever nothing is asked

Protocols:

* ``"last"``: the published one. After the string comes one pad token, and the answer is asked there alone.
* ``"every"``: at every position, the answer for the string up to and including it. Only tasks for which the
  prefix has an answer have it.
* ``"output"``: the answer is a string of its own, asked at positions after the input, where the input is the
  pad token (or, for recall tasks, wherever a query stands).

Rows of a batch may differ in length; they are padded at the end, where nothing is asked. Models are causal,
so the padding changes nothing.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openxlstm.evaluation.streams import Stream
from openxlstm.training.metrics import IGNORED

PAD = 0
Lengths = NDArray[np.int64]


class TaskBatch(NamedTuple):
    """Strings with their answers."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, ``IGNORED`` where nothing is asked."""
    lengths: Tensor
    """(B,) int64: symbols of each string, without separators and answers."""


class Task(abc.ABC):
    """A task. Subclasses are stateless; everything random comes from the stream."""

    name: str
    """What the registry and the command line call it."""
    summary: str
    """One line for listings."""
    vocab_size: int
    """Number of tokens, the pad token included."""
    answers: tuple[int, ...]
    """Tokens that can be the answer."""
    protocols: tuple[str, ...] = ("last",)
    """The protocols it has, the usual one first."""
    shortest: int = 1
    """Shortest string."""
    longest: int | None = None
    """Longest string, if there is one."""
    step: int = 1
    """Lengths are ``shortest``, ``shortest + step``, ..."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing, 1 / number of possible answers (as in the published scaled accuracy)."""
        return 1 / len(self.answers)

    def scaled(self, accuracy: float) -> float:
        """Scaled accuracy (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect."""
        return (accuracy - self.chance) / (1 - self.chance)

    def lengths(self, low: int, high: int) -> Lengths:
        """The lengths this task has from ``low`` to ``high``.

        Raises:
            ValueError: none.
        """
        if low > high:
            raise ValueError(f"lengths must go from the shorter to the longer, got {low} to {high}")
        first = self.shortest + max(0, -(-(low - self.shortest) // self.step)) * self.step
        last = high if self.longest is None else min(high, self.longest)
        found = np.arange(first, last + 1, self.step, dtype=np.int64)
        if not found.size:
            wanted = f"length {low}" if low == high else f"a length from {low} to {high}"
            raise ValueError(f"task '{self.name}' has no strings of {wanted}: {self.describe_lengths()}")
        return found

    def describe_lengths(self) -> str:
        """Which lengths there are, as a clause for messages."""
        text = f"its lengths start at {self.shortest}"
        if self.step > 1:
            text += f" and go up in steps of {self.step}"
        return text if self.longest is None else f"{text} and end at {self.longest}"

    def batch(
        self,
        split: str,
        indices: Sequence[int] | range | NDArray[Any],
        *,
        lengths: tuple[int, int],
        protocol: str | None = None,
        seed: int = 0,
    ) -> TaskBatch:
        """Strings ``indices`` of a split. A string depends on nothing but (seed, task, split, index,
        lengths).

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            indices: numbers of the strings.
            lengths: shortest and longest length; each string has one of those the task has, uniformly.
            protocol: one of :attr:`protocols`; None is the first.
            seed: of the data.

        Raises:
            ValueError: a protocol or a length that the task does not have, or an unknown split.
        """
        protocol = self.check_protocol(protocol)
        possible = self.lengths(*lengths)
        stream = Stream(self.name, split, np.asarray(indices), seed)
        chosen = possible[stream.up_to(np.full(len(stream), len(possible)))]
        if not chosen.size:
            raise ValueError("a batch needs at least one string; indices is empty")
        tokens, targets = self.strings(stream, chosen, protocol)
        # one allocation for both: from 4 MiB on numpy asks for huge pages, and page faults cost more than
        # making the strings
        both = np.empty((2, *tokens.shape), dtype=np.int64)
        both[0], both[1] = tokens, targets
        shared = torch.from_numpy(both)
        return TaskBatch(shared[0], shared[1], torch.from_numpy(chosen))

    def check_protocol(self, protocol: str | None) -> str:
        """``protocol``, or the usual one for None.

        Raises:
            ValueError: the task does not have it.
        """
        if protocol is None:
            return self.protocols[0]
        if protocol not in self.protocols:
            raise ValueError(
                f"task '{self.name}' has no protocol {protocol!r}; it has {', '.join(self.protocols)}"
            )
        return protocol

    @abc.abstractmethod
    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        """Tokens and targets (B, T) of strings with ``lengths`` (B,), padded at the end."""

    def render(self, tokens: Sequence[int]) -> str:
        """Tokens as text a person can read; by default their numbers."""
        return " ".join(str(int(token)) for token in tokens)


class PrefixTask(Task):
    """A task in which every prefix has an answer, or says that it has none."""

    protocols = ("every", "last")

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        tokens, answers = self.prefixes(stream, int(lengths.max()))
        if protocol == "every" and (lengths == tokens.shape[1]).all():
            return tokens, answers
        if protocol == "every":
            outside = np.arange(tokens.shape[1]) >= lengths[:, None]
            return np.where(outside, PAD, tokens), np.where(outside, IGNORED, answers)
        rows = np.arange(len(lengths))
        return ask_last(tokens, lengths, answers[rows, lengths - 1])

    @abc.abstractmethod
    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        """Tokens and the answer for each prefix, both (B, length), ``IGNORED`` where there is none."""


def ask_last(tokens: NDArray, lengths: Lengths, answers: NDArray) -> tuple[NDArray, NDArray]:
    """Tokens and targets of the protocol "last": a pad token after each string, with the answer as target."""
    padded = np.pad(tokens, ((0, 0), (0, 1)))
    targets = np.full(padded.shape, IGNORED, dtype=np.int16)
    targets[np.arange(len(lengths)), lengths] = answers
    if (lengths < tokens.shape[1]).any():
        padded[np.arange(padded.shape[1]) >= lengths[:, None]] = PAD
    return padded, targets
