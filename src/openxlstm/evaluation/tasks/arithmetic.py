"""Modular arithmetic: with and without brackets, and as an equation to solve.

Tokens: 1 to 5 are the digits 0 to 4, then + - * = ( ) x. A string of length L is an expression of L symbols;
with the protocol "last" an "=" follows, then the pad token at which the value is asked. All values are mod 5.
Conventions follow the published configurations of the xLSTM paper (arXiv 2405.04517).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks import automaton
from openxlstm.evaluation.tasks.expressions import (
    CLOSE,
    DIGIT,
    EQUALS,
    MINUS,
    MODULUS,
    OPEN,
    PLUS,
    TIMES,
    UNKNOWN,
    bracketed,
)
from openxlstm.evaluation.tasks.task import Lengths, PrefixTask, Task, ask_last
from openxlstm.training.metrics import IGNORED

SYMBOLS = {PLUS: "+", MINUS: "-", TIMES: "*", EQUALS: "=", OPEN: "(", CLOSE: ")", UNKNOWN: "x"}


def render(tokens: Sequence[int]) -> str:
    """The expression as text."""
    return "".join(SYMBOLS.get(int(t), str(int(t) - DIGIT)) for t in tokens if DIGIT <= int(t) <= UNKNOWN)


class ModularArithmetic(PrefixTask):
    """Digits joined by + - and *, which binds tighter; every prefix that ends in a digit has a value."""

    name = "modular-arithmetic"
    summary = "value mod 5 of an expression in + - *"
    vocab_size = 10
    answers = (1, 2, 3, 4, 5)
    step = 2
    values = np.add.outer(np.arange(MODULUS), np.arange(MODULUS)).reshape(-1).astype(np.uint8) % MODULUS
    """Of a state: 5 times the terms that are closed plus the open term."""

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """The state after "operator digit", (25, 15): + and - close the term, * goes on with it."""
        rows = [
            [
                *(MODULUS * ((closed + term) % MODULUS) + digit for digit in range(MODULUS)),
                *(MODULUS * ((closed + term) % MODULUS) + -digit % MODULUS for digit in range(MODULUS)),
                *(MODULUS * closed + term * digit % MODULUS for digit in range(MODULUS)),
            ]
            for closed, term in np.ndindex(MODULUS, MODULUS)
        ]
        return np.array(rows, dtype=np.int64)

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        terms = (length + 1) // 2
        digits = stream.below(MODULUS, terms)
        operators = stream.below(3, terms)  # what stands before the digit: 0 is +, 1 is -, 2 is *
        operators[:, 0] = 0
        tokens = np.empty((len(digits), 2 * terms - 1), dtype=np.uint8)
        tokens[:, ::2] = digits + np.uint8(DIGIT)
        tokens[:, 1::2] = operators[:, 1:] + np.uint8(PLUS)
        answers = np.full(tokens.shape, IGNORED, dtype=np.int16)
        states = automaton.run(self.table, operators * np.uint8(MODULUS) + digits)
        answers[:, ::2] = self.values[states] + np.uint8(DIGIT)
        return tokens[:, :length], answers[:, :length]

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        if protocol == "every":
            return super().strings(stream, lengths, protocol)
        tokens, answers = self.prefixes(stream, int(lengths.max()))
        rows = np.arange(len(lengths))
        return ask_value(tokens, lengths, answers[rows, lengths - 1])

    def render(self, tokens: Sequence[int]) -> str:
        return render(tokens)


def ask_value(tokens: NDArray, lengths: Lengths, answers: NDArray) -> tuple[NDArray, NDArray]:
    """Append "=" to every expression and ask for the answer after it."""
    longer = np.pad(tokens, ((0, 0), (0, 1)))
    longer[np.arange(len(lengths)), lengths] = EQUALS
    return ask_last(longer, lengths + 1, answers)


class ModularArithmeticBrackets(Task):
    """Bracketed expressions over + - and *."""

    name = "modular-arithmetic-brackets"
    summary = "value mod 5 of an expression with brackets"
    vocab_size = 12
    answers = (1, 2, 3, 4, 5)

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        tokens, values = bracketed(stream, lengths, 3)
        return ask_value(tokens, lengths, values + DIGIT)

    def render(self, tokens: Sequence[int]) -> str:
        return render(tokens)


class SolveEquation(Task):
    """A bracketed expression over + and - with one digit replaced by x, "=" and its value; x is asked.

    Every digit counts once, with a sign, so there is exactly one solution. The length is that of the
    expression.
    """

    name = "solve-equation"
    summary = "the x for which a bracketed expression has the given value mod 5"
    vocab_size = 13
    answers = (1, 2, 3, 4, 5)

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        tokens, values = bracketed(stream, lengths, 2)
        rows = np.arange(len(lengths))
        is_digit = tokens < DIGIT + MODULUS
        counts = np.count_nonzero(is_digit, axis=1)
        chosen = np.cumsum(counts) - counts + stream.up_to(counts)
        at = np.flatnonzero(is_digit)[chosen] - rows * tokens.shape[1]
        solution = tokens[rows, at].copy()
        tokens[rows, at] = UNKNOWN
        longer = np.pad(tokens, ((0, 0), (0, 2)))
        longer[rows, lengths] = EQUALS
        longer[rows, lengths + 1] = values + DIGIT
        return ask_last(longer, lengths + 2, solution)

    def render(self, tokens: Sequence[int]) -> str:
        return render(tokens)
