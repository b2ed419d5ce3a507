"""How far back a token still matters: three views of a model's memory on real text.

* :func:`loss_by_position`: mean loss at each distance from the beginning; it falls as long as more past
  helps.
* :func:`loss_by_context`: the same tokens predicted from only the last k tokens of their past. The effective
  context is the shortest k that comes within a tolerance of the whole past.
* :func:`foreign_past`: how much a wrong past still shows. Two copies of a model that differ in their past
  alone read the same text; the Kullback-Leibler divergence between their predictions, by tokens read since,
  is how the state forgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.evaluation.text import evaluating, require_states
from openxlstm.evaluation.trial import streamed_logits

TOKENS_AT_ONCE = 4096


def cut_rows(tokens: Sequence[int], length: int, rows: int) -> Tensor:
    """``rows`` rows (B, length) of consecutive tokens, evenly spread over the text.

    Raises:
        ValueError: the text is shorter than one row.
    """
    if length < 1 or rows < 1:
        raise ValueError(f"length and number of rows must be at least 1, got {length} and {rows}")
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than the {length} that are needed; "
            "use a longer text or a shorter length"
        )
    room = len(tokens) - length
    count = min(rows, room + 1)
    starts = [room * n // max(count - 1, 1) for n in range(count)]
    return torch.tensor([list(tokens[start : start + length]) for start in starts], dtype=torch.long)


def loss_by_position(model: nn.Module, rows: Tensor, first: int | None = None) -> Tensor:
    """Mean loss in nats at each position, over rows (B, T) that start from the empty state.

    Args:
        model: a language model.
        rows: token ids, int64.
        first: beginning-of-sequence token to put before each row.

    Returns:
        (T,) with it, (T - 1,) without (there is nothing to predict the first token from).
    """
    if first is not None:
        rows = torch.cat([torch.full_like(rows[:, :1], first), rows], dim=1)
    inputs, targets, parts = rows[:, :-1], rows[:, 1:], []
    start = 0
    for logits in streamed_logits(model, inputs):
        wanted = targets[:, start : start + logits.shape[1]]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
        parts.append(losses.view(wanted.shape).double().mean(0))
        start += logits.shape[1]
    return torch.cat(parts)


class ContextLoss(NamedTuple):
    """Loss with a limited past."""

    lengths: tuple[int, ...]
    """Tokens of past, ascending; the last is the whole past."""
    losses: tuple[float, ...]
    """Mean nats per token with each."""
    effective: int
    """The shortest past whose loss is within the tolerance of the whole past's."""
    tolerance: float


def loss_by_context(
    model: nn.Module,
    rows: Tensor,
    *,
    asked: int = 32,
    lengths: Sequence[int] | None = None,
    tolerance: float = 0.01,
) -> ContextLoss:
    """Predict the last ``asked`` tokens of each row from only k tokens before them, for several k.

    Args:
        model: a language model.
        rows: token ids (B, T), T > ``asked``. The past is cut hard: the model starts anew k tokens before the
            first asked one, so the j-th asked token sees k + j tokens.
        asked: tokens that are predicted.
        lengths: the k; None is powers of two up to the whole past.
        tolerance: relative difference that counts as none.

    Raises:
        ValueError: rows too short, or lengths beyond them.
    """
    past = rows.shape[1] - asked
    if asked < 1 or past < 1:
        raise ValueError(f"rows of {rows.shape[1]} tokens leave no past before {asked} asked ones")
    chosen = [2**n for n in range(past.bit_length()) if 2**n < past] if lengths is None else list(lengths)
    chosen = sorted({*chosen, past})
    if chosen[0] < 1 or chosen[-1] > past:
        raise ValueError(f"contexts must lie between 1 and {past} tokens, got {chosen[0]} to {chosen[-1]}")
    losses = [
        float(loss_by_position(model, rows[:, past - length :])[length - 1 :].mean()) for length in chosen
    ]
    effective = next(
        k for k, loss in zip(chosen, losses, strict=True) if loss <= losses[-1] * (1 + tolerance)
    )
    return ContextLoss(tuple(chosen), tuple(losses), effective, tolerance)


def foreign_past(model: nn.Module, pasts: Tensor, text: Tensor) -> Tensor:
    """How predictions still differ after a wrong past, by tokens read since.

    Args:
        model: a language model with states.
        pasts: (B, P): row b is the true past of row b of ``text``; the wrong one is row b + 1.
        text: (B, T) what both read afterwards.

    Returns:
        (T,): mean KL(true past || wrong past) in nats after 1, 2, ... T tokens.

    Raises:
        ValueError: fewer than two rows, or a model without states.
    """
    require_states(model)
    if pasts.shape[0] < 2 or pasts.shape[0] != text.shape[0]:
        raise ValueError(
            f"a wrong past needs at least two rows and as many pasts as texts, got {pasts.shape[0]} and "
            f"{text.shape[0]}"
        )
    with evaluating(model):
        state = None
        for part in pasts.split(TOKENS_AT_ONCE, dim=1):
            _, state = model(part, state, return_state=True)
        assert state is not None
        wrong = state.select([*range(1, pasts.shape[0]), 0])
        divergences: list[Tensor] = []
        for part in text.split(256, dim=1):
            right_logits, state = model(part, state, return_state=True)
            wrong_logits, wrong = model(part, wrong, return_state=True)
            p, q = right_logits.float().log_softmax(-1), wrong_logits.float().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1).double().mean(0))
    return torch.cat(divergences)


def half_life(values: Tensor) -> int | None:
    """First place (from 1) at which ``values`` (T,) are at most half their first value; None if nowhere."""
    below = (values <= values[0] / 2).nonzero()
    return int(below[0]) + 1 if len(below) else None
