"""Batches of packed rows, the same on every machine: :class:`PackedLoader`.

**Rows.** The positions of a split (see :mod:`openxlstm.data.dataset`) are cut into rows of
``context_length``; a row holds several documents or a part of one. ``reset`` is True exactly where a document
starts, so the model never carries anything from one document to the next. Rows are independent: the first
position of a row starts from the empty state (pass no state to the model), also where the row begins inside a
document; there ``reset`` is False and the input is the document's previous token instead of BOS.

**Shuffled order** (training), endless. Epoch e cuts the positions, taken as a ring, into floor(N / T) rows
from an offset that depends on (seed, e), and visits them in a permutation that depends on (seed, e). Each
epoch thus predicts every position at most once and all but N mod T (fewer than one row, other ones each
time), with other cuts. Row number r of the run is row r mod floor(N / T) of epoch r div floor(N / T), and
global batch s is the rows s * batch_size to (s + 1) * batch_size: a batch is computed directly from (seed,
s). The permutation is a small cipher (a Feistel network with cycle walking), so it takes no memory and does
not depend on a library's generator.

**Sequential order** (validation). Rows in order from position 0, each position exactly once; the end of the
last batch is filled with ignored positions (target -100), so that shapes stay the same.

Ranks take contiguous parts of the global batch, which is defined first: the order depends on neither the
number of ranks nor prefetching.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openxlstm.data.dataset import TokenDataset
from openxlstm.ops.cross_entropy import IGNORED

Order = Literal["shuffled", "sequential"]


class Batch(NamedTuple):
    """Rows of one batch, B of them with T positions."""

    tokens: Tensor
    """Inputs, int64 (B, T)."""
    targets: Tensor
    """What to predict at each position, int64 (B, T); -100 is ignored."""
    reset: Tensor
    """True where a document starts, bool (B, T)."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    @property
    def num_targets(self) -> int:
        """Number of positions that count."""
        return int((self.targets != IGNORED).sum())


class PackedLoader:
    """Packed batches of a dataset; see the module for the exact order.

    Iterating over a shuffled loader is endless, starts at ``step`` and counts it up; over a sequential one it
    is one pass from the beginning. ``len(loader)`` is the number of batches in a pass (the last one shared
    with the next epoch if shuffled).

    Args:
        dataset: what to read.
        batch_size: rows of the global batch, over all ranks.
        context_length: positions in a row.
        seed: of the shuffled order.
        order: ``"shuffled"`` or ``"sequential"``.
        rank: which part of each batch to give, 0 <= rank < world_size.
        world_size: number of ranks; divides ``batch_size``.
        vocab_size: the model's vocabulary, to check that it covers the data.
        prefetch: batches that a thread prepares ahead while iterating; 0 for none.

    Raises:
        ValueError: sizes out of range, fewer positions than one row, or ids outside ``vocab_size``.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        order: Order = "shuffled",
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or context_length < 1:
            raise ValueError(
                f"batch_size and context_length must be at least 1, got {batch_size} and {context_length}"
            )
        if order not in get_args(Order):
            raise ValueError(f"order must be 'shuffled' or 'sequential', got '{order}'")
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, got {prefetch}")
        _check_ranks(batch_size, rank, world_size)
        if vocab_size is not None and dataset.max_token_id >= vocab_size:
            raise ValueError(
                f"the data in '{dataset.directory}' has token id {dataset.max_token_id}, but the "
                f"model's vocabulary has {vocab_size} tokens; use vocab_size={dataset.vocab_size} or more"
            )
        rows = len(dataset) // context_length
        if order == "shuffled" and rows == 0:
            raise ValueError(
                f"the {dataset.split} split has {len(dataset)} tokens, fewer than one row of context_length "
                f"{context_length}; use a shorter context_length or more text"
            )
        self.dataset = dataset
        self.batch_size, self.context_length = batch_size, context_length
        self.seed, self.order = seed, order
        self.rank, self.world_size = rank, world_size
        self.prefetch = prefetch
        self.rows = rows if order == "shuffled" else -(-len(dataset) // context_length)
        """Rows in a pass."""
        self._epochs: dict[int, tuple[int, Permutation]] = {}
        self.step = 0
        """Number of global batches that iteration has given out (shuffled order)."""

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def epoch(self) -> float:
        """Passes over the data that the batches up to ``step`` make."""
        return self.step * self.batch_size / self.rows

    def __iter__(self) -> Iterator[Batch]:
        if self.order == "sequential":
            yield from self._prefetched(range(len(self)))
            return
        for batch in self._prefetched(itertools.count(self.step)):
            self.step += 1
            yield batch

    def _prefetched(self, steps: Iterable[int]) -> Iterator[Batch]:
        if self.prefetch == 0:
            yield from map(self.batch, steps)
            return
        steps = iter(steps)
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            ahead: deque[Future[Batch]] = deque(
                pool.submit(self.batch, step) for step in itertools.islice(steps, self.prefetch)
            )
            while ahead:
                ready = ahead.popleft()
                ahead.extend(pool.submit(self.batch, step) for step in itertools.islice(steps, 1))
                yield ready.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int, rank: int | None = None, world_size: int | None = None) -> Batch:
        """The batch of a global step, computed directly.

        Args:
            step: counted from 0; below ``len(self)`` for the sequential order.
            rank: part of the global batch to give; default the loader's.
            world_size: number of parts; default the loader's.

        Returns:
            ``batch_size / world_size`` rows.

        Raises:
            IndexError: no such step.
            ValueError: ``rank`` and ``world_size`` do not fit.
        """
        rank = self.rank if rank is None else rank
        world_size = self.world_size if world_size is None else world_size
        _check_ranks(self.batch_size, rank, world_size)
        if step < 0 or (self.order == "sequential" and step >= len(self)):
            raise IndexError(f"there is no batch {step}; a {self.order} pass has {len(self)}, counted from 0")
        count = self.batch_size // world_size
        first = step * self.batch_size + rank * count
        shape = (count, self.context_length)
        tokens = np.full(shape, self.dataset.manifest.tokenizer.bos_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        reset = np.zeros(shape, np.bool_)
        fill = self._read_ring if self.order == "shuffled" else self._read_until_end
        for row in range(count):
            fill(self._row_start(first + row), tokens[row], targets[row], reset[row])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(reset))

    def _row_start(self, row: int) -> int:
        """First position of a row, by its number in the run."""
        if self.order == "sequential":
            return row * self.context_length
        epoch, within = divmod(row, self.rows)
        offset, place = self._epoch_order(epoch)
        return (offset + place(within) * self.context_length) % len(self.dataset)

    def _epoch_order(self, epoch: int) -> tuple[int, Permutation]:
        """Where an epoch's first row begins, and the order of its rows."""
        known = self._epochs.get(epoch)
        if known is None:
            key = mix(mix(self.seed & _MASK) ^ epoch)
            known = mix(key ^ _MASK) % len(self.dataset), Permutation(self.rows, key)
            self._epochs = dict([*self._epochs.items(), (epoch, known)][-2:])
        return known

    def _read_ring(self, start: int, tokens: npt.NDArray, targets: npt.NDArray, reset: npt.NDArray) -> None:
        before_end = min(len(targets), len(self.dataset) - start)
        self.dataset.read(start, tokens[:before_end], targets[:before_end], reset[:before_end])
        if before_end < len(targets):
            self.dataset.read(0, tokens[before_end:], targets[before_end:], reset[before_end:])

    def _read_until_end(
        self, start: int, tokens: npt.NDArray, targets: npt.NDArray, reset: npt.NDArray
    ) -> None:
        count = max(0, min(len(targets), len(self.dataset) - start))
        self.dataset.read(min(start, len(self.dataset)), tokens[:count], targets[:count], reset[:count])

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue exactly: the step, and what the order depends on."""
        return {
            "step": self.step,
            "order": self.order,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context_length": self.context_length,
            "data": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that the saved loader had given out, on any number of ranks.

        Takes effect when iteration (next) starts.

        Raises:
            ValueError: the data, seed, batch size, context length or order differ, so the order would.
        """
        for name, value in self.state_dict().items():
            if name not in state:
                raise ValueError(
                    f"the saved loader state has no '{name}'; it is not from this kind of loader"
                )
            if name != "step" and state[name] != value:
                what = "was saved with other data" if name == "data" else f"has {name}={state[name]!r}"
                raise ValueError(
                    f"cannot continue exactly: the saved loader {what}, this one "
                    f"{'reads ' + repr(str(self.dataset.directory)) if name == 'data' else repr(value)}"
                )
        self.step = int(state["step"])


def _check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size, got {rank} of {world_size}")
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} cannot be divided among {world_size} ranks; use a multiple of it"
        )


# ---------------------------------------------------------------------- a permutation without memory

_MASK = 2**64 - 1
_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of ``range(size)``, evaluated at single places.

    A Feistel network of :func:`mix` permutes the smallest enclosing power of two; what lands outside
    ``range(size)`` is sent through again until it does not, which leaves a permutation of ``range(size)``.

    Args:
        size: at least 1.
        key: which permutation, 64 bits.
    """

    def __init__(self, size: int, key: int) -> None:
        bits = max(2, (size - 1).bit_length())
        self.size = size
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2
        self._keys = [(mix(key + 2 * n), mix(key + 2 * n + 1)) for n in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where the permutation takes ``index``."""
        low_bits, low_mask, high_shift = self._low_bits, (1 << self._low_bits) - 1, 64 - self._high_bits
        while True:
            high, low = index >> low_bits, index & low_mask
            for low_key, high_key in self._keys:
                high ^= mix(low ^ low_key) >> high_shift
                low ^= mix(high ^ high_key) >> (64 - low_bits)
            index = (high << low_bits) | low
            if index < self.size:
                return index


def mix(value: int) -> int:
    """SplitMix64's output function: 64 bits to 64 bits, each depending on all."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
