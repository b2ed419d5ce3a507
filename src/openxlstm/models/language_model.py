"""What both language models share: checks on tokens and states, and the split for weight decay."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from openxlstm.ops import linear_cross_entropy
from openxlstm.state import KVCache, ModelState, leaves, mLSTMSlots


class LanguageModel(nn.Module, abc.ABC):
    """A model from tokens (B, T) to logits (B, T, V) that can also go one token at a time."""

    config: Any
    lm_head: nn.Linear

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return self.config.vocab_size

    @abc.abstractmethod
    def hidden(
        self, tokens: Tensor, state: ModelState | None, *, return_state: bool, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """What the output matrix sees: tokens (B, T) -> ((B, T, E), state), after checking both."""

    def read(
        self, tokens: Tensor, state: ModelState | None = None, *, reset: Tensor | None = None
    ) -> ModelState:
        """The state after ``tokens`` (B, T), without computing logits; arguments as for ``forward``."""
        return self.hidden(tokens, state, return_state=True, reset=reset)[1]

    @property
    def logit_cap(self) -> float | None:
        """Soft cap of the logits, or None."""
        return None

    def summed_loss(self, tokens: Tensor, targets: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """Cross-entropy of the targets, without ever holding all logits; for training.

        Args:
            tokens: int64 (B, T).
            targets: int64 (B, T), -100 where a position does not count.
            reset: bool (B, T), True where a new document starts.

        Returns:
            Scalar float32, the sum in nats over the positions that count.

        Raises:
            ValueError: a token id or a target out of range.
        """
        x, _ = self.hidden(tokens, None, return_state=False, reset=reset)
        head = self.lm_head
        return linear_cross_entropy(x, head.weight, targets, head.bias, soft_cap=self.logit_cap)

    @abc.abstractmethod
    def step(self, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Advance by one token: tokens (B, 1) -> (logits (B, 1, V), state)."""

    @abc.abstractmethod
    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """The empty state: zeros."""

    @abc.abstractmethod
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the published initial values, from ``generator`` or PyTorch's global generator."""

    @abc.abstractmethod
    def weight_decay_split(self) -> tuple[list[str], list[str]]:
        """Names of the parameters that weight decay applies to, and of those it does not."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two parameter groups for AdamW: with ``weight_decay``, and without."""
        parameters = dict(self.named_parameters())
        decay, no_decay = self.weight_decay_split()
        return [
            {"params": [parameters[name] for name in decay], "weight_decay": weight_decay},
            {"params": [parameters[name] for name in no_decay], "weight_decay": 0.0},
        ]


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse anything but integer tokens (B, T) in [0, vocab_size). While compiling
    or capturing a CUDA graph, ids are not checked.

    Raises:
        ValueError: wrong shape, dtype, or a token id out of range.
    """
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be integers of shape (batch, time), got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if torch.compiler.is_compiling() or tokens.is_meta or not tokens.numel():
        return
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"token id {bad} is out of range for a vocabulary of {vocab_size} (0 to {vocab_size - 1}); "
            "was the text encoded with another tokenizer?"
        )


def check_step_input(x: Tensor) -> None:
    """Refuse anything but one position, (B, 1) or (B, 1, E).

    Raises:
        ValueError: more or fewer positions.
    """
    if x.ndim < 2 or x.shape[1] != 1:
        raise ValueError(
            f"step takes one position, shape (batch, 1, ...), got {tuple(x.shape)}; use forward for sequences"
        )


def state_layout(state: Any) -> tuple[Any, ...]:
    """What states of one model have in common: ``(node type, children...)`` down to the shapes of one row."""
    if isinstance(state, mLSTMSlots):
        state = state.memory
    if isinstance(state, Tensor):
        return tuple(state.shape[1:])
    if isinstance(state, KVCache):  # its length is no property of the model
        return (type(state).__name__, tuple(state.k.shape[2:]), tuple(state.v.shape[2:]))
    if not isinstance(state, tuple):
        return (type(state).__name__,)
    return (type(state).__name__, *(state_layout(part) for part in state))


def check_state(state: ModelState | None, layout: tuple[Any, ...], batch_size: int) -> None:
    """Refuse a state of another model or batch.

    Args:
        state: what the caller passed.
        layout: :func:`state_layout` of the model's own states. While compiling, only the number of blocks is
            compared.
        batch_size: rows of the input.

    Raises:
        ValueError: no ModelState; another number of blocks, other cells or widths; another number of rows.
    """
    if state is None:
        return
    if not isinstance(state, ModelState):
        raise ValueError(
            "the state must be a ModelState, as an earlier call or initial_state(batch_size) returns it, "
            f"got {type(state).__name__}"
        )
    _, (_, *blocks) = layout
    if len(state.blocks) != len(blocks):
        raise ValueError(
            f"the state belongs to a model of {len(state.blocks)} blocks, this one has {len(blocks)}"
        )
    if not torch.compiler.is_compiling():
        for index, (block, expected) in enumerate(zip(state.blocks, blocks, strict=True)):
            if state_layout(block) != expected:
                raise ValueError(
                    f"the state belongs to a model of other cells or widths: its block {index} holds "
                    f"{state_layout(block)} per row, this model's {expected}"
                )
    rows = next((leaf.shape[0] for leaf in leaves(state) if leaf.shape[0] != batch_size), batch_size)
    if rows != batch_size:
        raise ValueError(
            f"the state holds {rows} sequences, the input {batch_size}; "
            "select, stack or fork the state to match"
        )


def split_names(parameters: Iterable[tuple[str, Any]], decays: Any) -> tuple[list[str], list[str]]:
    """Names for which ``decays(name, parameter)`` holds, and the others, both in order."""
    decay: list[str] = []
    no_decay: list[str] = []
    for name, parameter in parameters:
        (decay if decays(name, parameter) else no_decay).append(name)
    return decay, no_decay
