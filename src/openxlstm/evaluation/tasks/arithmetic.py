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
LOGARITHM = np.array([0, 0, 1, 3, 2], dtype=np.uint8)  # to base 2, of 1 to 4 mod 5
POWER = np.array([1, 2, 4, 3], dtype=np.int8)
SIGN = np.array([1, -1], dtype=np.int8)
OPERATION = np.array([1, -1, 0], dtype=np.int16)  # factor of the right side of + - *


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
    place = np.arange(digits.shape[1], dtype=np.int32)
    own = LOGARITHM[digits]
    logs = np.cumsum(own, axis=1, dtype=np.uint8)  # mod 256, and so mod 4
    about = ((logs - own) & np.uint8(3)) | (operators << np.uint8(2))  # of a term that begins here
    term_of = np.maximum.accumulate(np.where(starts, (place << 4) | about, 0), axis=1)
    last_zero = np.maximum.accumulate(np.where(digits == 0, place, -1), axis=1)
    term = POWER[(logs - term_of.astype(np.uint8)) & np.uint8(3)]
    term[last_zero >= term_of >> 4] = 0
    term *= SIGN[(term_of >> 2) & 1]
    closed = np.zeros(term.shape, dtype=np.int16)  # the terms that ended before each digit
    np.cumsum(term[:, :-1] * starts[:, 1:], axis=1, dtype=np.int16, out=closed[:, 1:])
    return (closed + term) % np.int16(MODULUS)


def ask_value(tokens: NDArray, lengths: Lengths, answers: NDArray) -> tuple[NDArray, NDArray]:
    """Append "=" to every expression and ask for the answer after it."""
    longer = np.pad(tokens, ((0, 0), (0, 1)))
    longer[np.arange(len(lengths)), lengths] = EQUALS
    return ask_last(longer, lengths + 1, answers)


class Expressions(NamedTuple):
    """Bracketed expressions of a batch, and their values."""

    tokens: NDArray[np.uint8]
    """(B, longest), pad after each expression."""
    values: NDArray[np.int16]
    """(B,), mod 5."""


def bracketed(stream: Stream, lengths: Lengths, operators: int) -> Expressions:
    """Random expressions of exactly the given lengths, over all of the batch at once, depth by depth.

    Length 1 is a digit d, 2 is -d, 3 is (d), 4 is (-d); a longer one is (left op right), the length of left
    uniform from 1 to L - 4. What a place gets is addressed by the sample and the first symbol of the node,
    which differs between all nodes that draw, so it does not depend on the batch.

    Args:
        stream: one sample per expression.
        lengths: (B,), from 1.
        operators: 2 is + and -, 3 also *.
    """
    longest = int(lengths.max())
    tokens = np.zeros((len(lengths), longest), dtype=np.uint8)
    flat = tokens.reshape(-1)
    digits = stream.below(MODULUS, longest).reshape(-1)
    chosen = np.ascontiguousarray(stream.below(operators, longest)).reshape(-1)
    fractions = (stream.words(longest) >> np.uint64(32)).view(np.int64).reshape(-1)
    at, sizes = np.arange(len(lengths)) * longest, lengths  # of the nodes of one depth
    levels: list[tuple[NDArray, NDArray, NDArray]] = []  # values, which nodes are operations, which operation
    while at.size:
        composed = sizes > 4
        values = np.zeros(len(at), dtype=np.int16)
        leaf = ~composed
        if leaf.any():
            values[leaf] = _write_leaves(flat, digits, at[leaf], sizes[leaf])
        start, size = at[composed], sizes[composed]
        left = 1 + ((fractions[start] * (size - 4)) >> 32)
        operator = chosen[start]
        middle = start + left + 1
        flat[start], flat[middle], flat[start + size - 1] = OPEN, operator + np.uint8(PLUS), CLOSE
        levels.append((values, composed, operator))
        at = np.concatenate([start + 1, middle + 1])
        sizes = np.concatenate([left, size - left - 3])

    below = np.zeros(0, dtype=np.int16)
    for values, composed, operator in reversed(levels):
        a, b = below[: len(operator)], below[len(operator) :]
        values[composed] = np.where(operator == 2, a * b, a + OPERATION[operator] * b)
        below = values % np.int16(MODULUS)
    return Expressions(tokens, below)


def _write_leaves(flat: NDArray, digits: NDArray, at: NDArray, sizes: NDArray) -> NDArray:
    """Write nodes of up to four symbols into ``flat``; returns their values."""
    place = at + sizes // 2
    value = digits[place].astype(np.int16)
    flat[place] = value + DIGIT
    negative = (sizes & 1) == 0
    flat[place[negative] - 1] = MINUS
    wrapped = sizes > 2
    flat[at[wrapped]] = OPEN
    flat[(at + sizes)[wrapped] - 1] = CLOSE
    value[negative] *= -1
    return value


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
