"""xLSTM: the module to put where an ``nn.LSTM`` stands.

    y = stack(W x + b)                                     one direction
    y = [stack(W x + b) | reverse(stack'(W' reverse(x) + b'))]     both

with one block stack per direction, so layers are xLSTM blocks with their norms and residual connections, and
the two directions meet only at the end (``nn.LSTM`` joins them after every layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from openxlstm.layers.blocks import mLSTMBlockConfig, sLSTMBlockConfig
from openxlstm.layers.initialization import small_init_, zero_
from openxlstm.layers.linear import Linear
from openxlstm.layers.mlstm_layer import mLSTMLayerConfig
from openxlstm.layers.slstm_layer import sLSTMLayerConfig
from openxlstm.models.block_stack import xLSTMBlockStack, xLSTMBlockStackConfig
from openxlstm.models.language_model import check_state, state_layout
from openxlstm.state import ModelState, select, stack

_CELLS: dict[str, Callable[[int], range]] = {  # positions of the sLSTM blocks for a number of layers
    "mlstm": lambda num_layers: range(0),
    "slstm": lambda num_layers: range(num_layers),
    "mixed": lambda num_layers: range(1, num_layers, 2),
}


class xLSTM(nn.Module):
    """Recurrent network over sequences, called like ``torch.nn.LSTM``.

    Args:
        input_size: features of the input.
        hidden_size: features of the output, per direction.
        num_layers: number of xLSTM blocks.
        bias: biases in the input projection and the linear maps of the mLSTM blocks.
        batch_first: tensors are (B, T, features) instead of (T, B, features).
        dropout: dropout in the blocks.
        bidirectional: run a second stack from the end to the start and join the outputs.
        cell: ``"mlstm"`` (matrix memory, parallel over time), ``"slstm"`` (scalar memory, can track state) or
            ``"mixed"`` (alternating, mLSTM first).
        slstm_at: which blocks are sLSTM, as in :class:`xLSTMBlockStackConfig`; overrides ``cell``.
        num_heads: heads of every block; None takes the largest of 4, 2, 1 that divides ``hidden_size``.

    Raises:
        ValueError: sizes that are not positive, or heads that don't divide the width.

    The state is one :class:`openxlstm.state.ModelState`: the blocks of the forward direction, then those of
    the backward direction. Its leaves always have the batch first (1 for unbatched input), in the order of
    the input's rows, also for packed sequences.

    Example:
        >>> lstm = xLSTM(input_size=16, hidden_size=64, num_layers=2, batch_first=True)
        >>> output, state = lstm(torch.randn(3, 10, 16))
        >>> output.shape
        torch.Size([3, 10, 64])
        >>> output, state = lstm(torch.randn(3, 5, 16), state)  # goes on where it stopped
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        cell: Literal["mlstm", "slstm", "mixed"] = "mixed",
        slstm_at: Sequence[int] | str | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if cell not in _CELLS:
            raise ValueError(f"cell must be one of {', '.join(_CELLS)}, got {cell!r}")
        if num_heads is None:
            num_heads = next(heads for heads in (4, 2, 1) if hidden_size % heads == 0)
        if slstm_at is None:
            slstm_at = _CELLS[cell](num_layers)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.bidirectional = batch_first, bidirectional
        config = xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=num_heads)),
            slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=num_heads)),
            num_blocks=num_layers,
            embedding_dim=hidden_size,
            bias=bias,
            dropout=dropout,
            slstm_at=slstm_at if isinstance(slstm_at, str) else list(slstm_at),
        )
        directions = 2 if bidirectional else 1
        self.input_projections = nn.ModuleList(
            Linear(input_size, hidden_size, bias=bias) for _ in range(directions)
        )
        self.stacks = nn.ModuleList(xLSTMBlockStack(config) for _ in range(directions))
        self._reset_projections(None)
        self._state_layout = state_layout(self.initial_state(1, "meta"))

    def forward(
        self, input: Tensor | PackedSequence, state: ModelState | None = None
    ) -> tuple[Tensor | PackedSequence, ModelState]:
        """Run sequences.

        Args:
            input: (T, B, input_size), or (B, T, input_size) with ``batch_first``; (T, input_size) without a
                batch; or a ``PackedSequence`` of sequences of different lengths.
            state: what came before, the ModelState returned by the last call (there is no (h_0, c_0) as for
                ``nn.LSTM``); None is the empty state.

        Returns:
            output, in the form of the input with ``hidden_size * (2 if bidirectional else 1)`` features, and
            the state after the last position of each sequence (for the backward direction: after its first).

        Raises:
            ValueError: an input of another shape, or a state of another network or batch.
        """
        width = (input.data if isinstance(input, PackedSequence) else input).shape[-1]
        if width != self.input_size:
            raise ValueError(f"the input has {width} features, this xLSTM takes {self.input_size}")
        if isinstance(input, PackedSequence):
            check_state(state, self._state_layout, int(input.batch_sizes[0]))
            return self._run_packed(input, self._split_state(state))
        if input.ndim not in (2, 3):
            raise ValueError(f"the input must have 2 dimensions (unbatched) or 3, got {tuple(input.shape)}")
        x = input[None] if input.ndim == 2 else input if self.batch_first else input.transpose(0, 1)
        check_state(state, self._state_layout, x.shape[0])
        states = self._split_state(state)

        outputs, new_states = [], []
        for backward, (project, blocks) in enumerate(self._directions()):
            y, new_state = blocks(project(x.flip(1) if backward else x), states[backward], return_state=True)
            outputs.append(y.flip(1) if backward else y)
            new_states.append(new_state)
        y = torch.cat(outputs, dim=-1)
        y = y[0] if input.ndim == 2 else y if self.batch_first else y.transpose(0, 1)
        return y, _join_states(new_states)

    def _run_packed(
        self, packed: PackedSequence, states: list[ModelState | None]
    ) -> tuple[PackedSequence, ModelState]:
        data, batch_sizes, to_sorted, to_original = packed
        if to_sorted is not None:
            states = [None if s is None else select(s, to_sorted) for s in states]
        outputs, new_states = [], []
        for backward, (project, blocks) in enumerate(self._directions()):
            order = _reversed_order(batch_sizes).to(data.device) if backward else None
            x = project(data if order is None else data[order])
            y, new_state = _run_packed_stack(blocks, x, batch_sizes.tolist(), states[backward])
            outputs.append(y if order is None else y[order])
            new_states.append(new_state if to_original is None else select(new_state, to_original))
        output = PackedSequence(torch.cat(outputs, dim=-1), batch_sizes, to_sorted, to_original)
        return output, _join_states(new_states)

    def _directions(self) -> list[tuple[nn.Module, nn.Module]]:
        return list(zip(self.input_projections, self.stacks, strict=True))

    def _split_state(self, state: ModelState | None) -> list[ModelState | None]:
        """One state per direction."""
        directions, layers = len(self.stacks), self.num_layers
        if state is None:
            return [None] * directions
        return [
            ModelState(state.blocks[start : start + layers])
            for start in range(0, directions * layers, layers)
        ]

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros."""
        return _join_states([blocks.initial_state(batch_size, device) for blocks in self.stacks])  # pyright: ignore

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw fresh initial values, from ``generator`` or PyTorch's global generator."""
        for blocks in self.stacks:
            blocks.reset_parameters(generator)  # pyright: ignore
        self._reset_projections(generator)

    def _reset_projections(self, generator: Generator | None) -> None:
        for projection in self.input_projections:
            assert isinstance(projection, nn.Linear)
            small_init_(projection.weight, self.input_size, generator)
            zero_(projection.bias)


def _join_states(states: Sequence[ModelState]) -> ModelState:
    return ModelState(tuple(block for state in states for block in state.blocks))


def _run_packed_stack(
    blocks: nn.Module, x: Tensor, batch_sizes: list[int], state: ModelState | None
) -> tuple[Tensor, ModelState]:
    """Run a stack over the data (N, E) of a packed sequence, sorted by length, without any padding.

    Positions with the same number of running sequences go together; where sequences end, their rows leave
    with their states, so each sequence gets exactly what it would get alone.
    """
    outputs: list[Tensor] = []
    finished: list[ModelState] = []  # states of the sequences that have ended, shortest first
    start, time, running = 0, 0, batch_sizes[0]
    while time < len(batch_sizes):
        rows = batch_sizes[time]
        length = batch_sizes.count(rows)
        if rows < running:
            assert state is not None
            finished.append(select(state, range(rows, running)))
            state = select(state, range(rows))
        piece = x[start : start + rows * length].unflatten(0, (length, rows)).transpose(0, 1)
        y, state = blocks(piece, state, return_state=True)
        outputs.append(y.transpose(0, 1).flatten(0, 1))
        start, time, running = start + rows * length, time + length, rows
    assert state is not None
    return torch.cat(outputs), stack([state, *reversed(finished)])


def _reversed_order(batch_sizes: Tensor) -> Tensor:
    """Index (N,) that turns the data of a packed sequence into that of the reversed sequences, and back."""
    time = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes)
    first = batch_sizes.cumsum(0) - batch_sizes  # where each time step starts in the data
    row = torch.arange(len(time)) - first[time]
    lengths = (batch_sizes[None, :] > torch.arange(int(batch_sizes[0]))[:, None]).sum(1)
    return first[lengths[row] - 1 - time] + row
