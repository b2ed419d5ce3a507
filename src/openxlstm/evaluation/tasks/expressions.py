"""Random bracketed expressions and their values, for a whole batch at once.

An expression of length 1 is a digit d, of 2 is -d, of 3 is (d), of 4 is (-d); a longer one is (left op
right) with the length of left uniform from 1 to L - 4. Written out, digits and operators take turns. Between
an operator and the next digit there is nothing but "(" and the digit's own minus, between a digit and the
next operator nothing but ")". So the places of digits, minus signs and operators give those of all brackets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks.task import Lengths

MODULUS = 5
DIGIT = 1  # token of the digit 0
PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE, UNKNOWN = 6, 7, 8, 9, 10, 11, 12
LEAF = 4  # longest expression that is not an operation
RESULT = np.array(
    [
        [
            [result % MODULUS for result in (a + b, a - b, a * b)][operator]
            for a, b in np.ndindex(MODULUS, MODULUS)
        ]
        for operator in range(3)
    ],
    dtype=np.uint8,
).reshape(-1)
"""Value of "a operator b" at ``operator * 25 + a * 5 + b``."""
Flags = NDArray[np.uint8]
"""0 or 1 for each place of a batch, flat."""


class Expressions(NamedTuple):
    """Bracketed expressions of a batch, and their values."""

    tokens: NDArray[np.uint8]
    """(B, longest); what stands after an expression means nothing."""
    values: NDArray[np.uint8]
    """(B,), mod 5."""


class Splits(NamedTuple):
    """The operations of one depth, by the flat place of their first symbols."""

    at: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]


def bracketed(stream: Stream, lengths: Lengths, operators: int) -> Expressions:
    """Random expressions of exactly the given lengths.

    Operations are split depth by depth; everything else happens at all places at once. A place is an "(" that
    opens an operation, a digit or an operator, and never two of them, so one random number per place serves
    whichever it is, and an expression does not depend on its batch.

    Args:
        stream: one sample per expression.
        lengths: (B,), from 1.
        operators: 2 is + and -, 3 also *.
    """
    longest = int(lengths.max())
    lanes = stream.lanes(longest)
    width, lanes = lanes.shape[1], lanes.reshape(-1)
    upper = lanes >> np.uint32(16)
    digits = ((upper * np.uint32(MODULUS)) >> np.uint32(16)).astype(np.uint8)
    chosen = ((upper * np.uint32(operators)) >> np.uint32(16)).astype(np.uint8)
    roots = np.arange(len(lengths)) * width
    sizes, is_operator, depths = _split(lanes, roots, lengths)

    leaves = [(sizes == size).view(np.uint8) for size in range(1, LEAF + 1)]
    is_digit = leaves[0].copy()
    is_digit[1:] |= leaves[1][:-1] | leaves[2][:-1]
    is_digit[2:] |= leaves[3][:-2]
    is_minus = leaves[1].copy()
    is_minus[1:] |= leaves[3][:-1]
    closing = np.bitwise_xor.accumulate((is_digit | is_operator).reshape(-1, width), axis=1).reshape(-1)
    tokens = (closing + np.uint8(OPEN)) * (1 - (is_digit | is_minus | is_operator))
    tokens += is_digit * (digits + np.uint8(DIGIT))
    tokens += is_minus * np.uint8(MINUS)
    tokens += is_operator * (chosen + np.uint8(PLUS))
    values = _values(leaves, digits, chosen, depths)
    return Expressions(tokens.reshape(-1, width)[:, :longest], values[roots])


def _split(
    lanes: NDArray[np.uint32], at: NDArray[np.int64], sizes: Lengths
) -> tuple[NDArray[np.uint8], Flags, list[Splits]]:
    """Split the expressions at ``at`` until nothing but leaves is left.

    Returns:
        the size of the node that begins at each place (0 where none does, LEAF + 1 for operations), where
        operators stand, and the operations of each depth.
    """
    found, is_operator, depths = np.zeros(lanes.size, np.uint8), np.zeros(lanes.size, np.uint8), []
    while at.size:
        found[at] = np.minimum(sizes, LEAF + 1)
        operations = np.flatnonzero(sizes > LEAF)
        at, sizes = at[operations], sizes[operations]
        left = 1 + ((lanes[at] * (sizes - LEAF)) >> 32)
        first, operator = at + 1, at + 1 + left
        is_operator[operator] = 1
        depths.append(Splits(at, first, operator + 1))
        at, sizes = np.concatenate([first, operator + 1]), np.concatenate([left, sizes - 3 - left])
    return found, is_operator, depths


def _values(
    leaves: list[Flags], digits: NDArray[np.uint8], chosen: NDArray[np.uint8], depths: list[Splits]
) -> NDArray[np.uint8]:
    """The value mod 5 of the node that begins at each place, from the leaves up."""
    negated = (np.uint8(MODULUS) - digits) * (digits > 0)
    values = leaves[0] * digits
    values[:-1] += leaves[1][:-1] * negated[1:] + leaves[2][:-1] * digits[1:]
    values[:-2] += leaves[3][:-2] * negated[2:]
    for at, left, right in reversed(depths):
        case = chosen[right - 1] * np.uint8(MODULUS**2) + values[left] * np.uint8(MODULUS) + values[right]
        values[at] = RESULT[case]
    return values
