"""Deterministic finite automata over a batch of strings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def run(table: NDArray[np.int64], symbols: NDArray[np.uint8]) -> NDArray[np.signedinteger]:
    """The states after each symbol, starting from state 0, in lockstep over the batch.

    Args:
        table: (states, symbols), the state that follows.
        symbols: (B, T).

    Returns:
        (B, T), of the smallest signed type in which there is room for the work.
    """
    bits = (table.shape[1] - 1).bit_length()  # a state is kept as the place of its row in the flat table,
    rows = np.zeros((len(table), 1 << bits), dtype=np.int64)  # so that a step is one sum and one look-up
    rows[:, : table.shape[1]] = table << bits
    following = rows.reshape(-1)
    inputs = np.ascontiguousarray(symbols.T)  # time first: a step reads one contiguous row
    states = np.empty(inputs.shape, dtype=np.min_scalar_type(-following.size))
    state = np.zeros(len(symbols), dtype=np.int64)
    for time, read in enumerate(inputs):
        state = following[state + read]
        states[time] = state
    return np.ascontiguousarray(states.T) >> states.dtype.type(bits)
