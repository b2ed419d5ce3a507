"""Modular arithmetic: with and without brackets, and as an equation to solve.

Tokens: 1 to 5 are the digits 0 to 4, then + - * = ( ) x. A string of length L is an expression of L symbols;
with the protocol "last" an "=" follows, then the pad token at which the value is asked. All values are mod 5.
Conventions follow the published configurations of the xLSTM paper (arXiv 2405.04517).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks.task import Lengths, PrefixTask, Task, ask_last
from openxlstm.training.metrics import IGNORED

MODULUS = 5
DIGIT = 1  # token of the digit 0
PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE, UNKNOWN = 6, 7, 8, 9, 10, 11, 12
SYMBOLS = {PLUS: "+", MINUS: "-", TIMES: "*", EQUALS: "=", OPEN: "(", CLOSE: ")", UNKNOWN: "x"}
LOGARITHM = np.array([0, 0, 1, 3, 2], dtype=np.int8)  # to base 2, of 1 to 4 mod 5
POWER = np.array([1, 2, 4, 3], dtype=np.int8)


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

    def prefixes(self, stream: Stream, length: int) -> tuple[NDArray, NDArray]:
        terms = (length + 1) // 2
        digits = stream.below(MODULUS, terms)
        operators = stream.below(3, terms)  # what stands before the digit: 0 is +, 1 is -, 2 is *
        operators[:, 0] = 0
        tokens = np.empty((len(digits), 2 * terms - 1), dtype=np.uint8)
        tokens[:, ::2] = digits + np.uint8(DIGIT)
        tokens[:, 1::2] = operators[:, 1:] + np.uint8(PLUS)
        answers = np.full(tokens.shape, IGNORED, dtype=np.int16)
        answers[:, ::2] = running_value(digits, operators) + DIGIT
        return tokens[:, :length], answers[:, :length]

    def strings(self, stream: Stream, lengths: Lengths, protocol: str) -> tuple[NDArray, NDArray]:
        if protocol == "every":
            return super().strings(stream, lengths, protocol)
        tokens, answers = self.prefixes(stream, int(lengths.max()))
        rows = np.arange(len(lengths))
        return ask_value(tokens, lengths, answers[rows, lengths - 1])

    def render(self, tokens: Sequence[int]) -> str:
        return render(tokens)


def running_value(digits: NDArray[np.uint8], operators: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Value mod 5 of the expression up to each digit, without a loop over time.

    A product since the last + or - is a sum of logarithms to base 2 (which generates the units mod 5), or
    zero if a zero is among its factors; both are differences of running sums. The terms before it add up.
    """
    starts = operators < 2
    place = np.where(starts, np.arange(digits.shape[1], dtype=np.int32), 0)
    first = np.maximum.accumulate(place, axis=1)  # where the current term began
    logs = np.cumsum(LOGARITHM[digits], axis=1, dtype=np.int32)
    zeros = np.cumsum(digits == 0, axis=1, dtype=np.int32)
    before = np.take_along_axis(logs - LOGARITHM[digits], first, axis=1)
    zeros_before = np.take_along_axis(zeros - (digits == 0), first, axis=1)
    term = np.where(zeros > zeros_before, np.int8(0), POWER[(logs - before) & 3])
    negative = np.take_along_axis(operators, first, axis=1) == 1
    term = np.where(negative, -term, term)
    closed = np.zeros(term.shape, dtype=np.int32)  # the terms that ended before each digit
    np.cumsum(np.where(starts[:, 1:], term[:, :-1], 0), axis=1, out=closed[:, 1:])
    return ((closed + term) % MODULUS).astype(np.int16)


def ask_value(tokens: NDArray, lengths: Lengths, answers: NDArray) -> tuple[NDArray, NDArray]:
    """Append "=" to every expression and ask for the answer after it."""
    longer = np.pad(tokens, ((0, 0), (0, 1)))
    longer[np.arange(len(lengths)), lengths] = EQUALS
    return ask_last(longer, lengths + 1, answers)


class Expressions(NamedTuple):
    """Bracketed expressions of a batch, and their values."""

    tokens: NDArray[np.uint8]
    """(B, longest), pad after each expression."""
    values: NDArray[np.int64]
    """(B,), mod 5."""


class _Level(NamedTuple):
    """Nodes of one depth: digits, negations or operations, and where their parts stand in the next level."""

    operator: NDArray[np.int64]
    """1, -1 or 0 (times) for an operation; -1 for a negation, 1 for brackets alone, with ``right`` -1."""
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    digit: NDArray[np.int64]


def bracketed(stream: Stream, lengths: Lengths, operators: int) -> Expressions:
    """Random expressions of exactly the given lengths, over all of the batch at once, depth by depth.

    Length 1 is a digit d, 2 is -d, 3 is (d), 4 is (-d); a longer one is (left op right), the length of left
    uniform from 1 to L - 4.

    Args:
        stream: one sample per expression.
        lengths: (B,), from 1.
        operators: 2 is + and -, 3 also *.
    """
    longest = int(lengths.max())
    tokens = np.zeros((len(lengths), longest), dtype=np.uint8)
    # What a place gets is addressed by (sample, start of the node), so it does not depend on the batch: the
    # starts of nodes that draw a split or an operator are all different.
    digits = stream.below(MODULUS, longest)
    chosen = stream.below(operators, longest)
    fractions = stream.words(longest) >> np.uint64(32)
    rows, starts, sizes = np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths
    levels: list[_Level] = []
    while rows.size:
        composed = sizes > 4
        digit_at = starts + np.array([0, 1, 1, 2, 2])[np.minimum(sizes, 5) - 1]
        value = digits[rows, np.minimum(digit_at, longest - 1)].astype(np.int64)
        leaf = ~composed
        tokens[rows[leaf], digit_at[leaf]] = value[leaf] + DIGIT
        negated = (sizes == 2) | (sizes == 4)
        tokens[rows[negated], digit_at[negated] - 1] = MINUS
        wrapped = sizes >= 3
        tokens[rows[wrapped], starts[wrapped]] = OPEN
        tokens[rows[wrapped], (starts + sizes - 1)[wrapped]] = CLOSE

        row, start, size = rows[composed], starts[composed], sizes[composed]
        left_size = 1 + ((fractions[row, start] * (size - 4).astype(np.uint64)) >> np.uint64(32)).astype(
            np.int64
        )
        operator = chosen[row, start].astype(np.int64)
        tokens[row, start + 1 + left_size] = operator + PLUS
        count = len(row)
        left, right = np.full(len(rows), -1), np.full(len(rows), -1)
        left[composed], right[composed] = np.arange(count), count + np.arange(count)
        sign = np.where(negated, -1, 1)
        sign[composed] = np.array([1, -1, 0])[operator]
        levels.append(_Level(sign, left, right, value))
        rows = np.concatenate([row, row])
        starts = np.concatenate([start + 1, start + 2 + left_size])
        sizes = np.concatenate([left_size, size - left_size - 3])

    below = np.zeros(1, dtype=np.int64)
    for level in reversed(levels):
        inner = level.right >= 0
        values = level.operator * level.digit
        a, b = below[level.left[inner]], below[level.right[inner]]
        op = level.operator[inner]
        values[inner] = np.where(op == 0, a * b, a + op * b)
        below = values % MODULUS
    return Expressions(tokens, below)


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
        is_digit = (tokens >= DIGIT) & (tokens < DIGIT + MODULUS)
        which = stream.up_to(is_digit.sum(axis=1))
        at = np.argmax(np.cumsum(is_digit, axis=1) > which[:, None], axis=1)
        rows = np.arange(len(lengths))
        solution = tokens[rows, at].copy()
        tokens[rows, at] = UNKNOWN
        longer = np.pad(tokens, ((0, 0), (0, 2)))
        longer[rows, lengths] = EQUALS
        longer[rows, lengths + 1] = values + DIGIT
        return ask_last(longer, lengths + 2, solution)

    def render(self, tokens: Sequence[int]) -> str:
        return render(tokens)
