"""From logits to the next token.

The distribution of a step is built from the logits in this order, every part optional:

1. repetition penalty (Keskar et al. 2019, CTRL): logits of tokens that occurred before are divided by the
   penalty when positive and multiplied by it when negative;
2. temperature: logits divided by it (0: always the largest logit, nothing below applies);
3. top-k: only the k largest stay;
4. top-p (Holtzman et al. 2020): the smallest set of most likely tokens whose probability reaches p stays;
5. min-p (Nguyen et al. 2024): tokens at least ``min_p`` times as likely as the most likely one stay.

Filters see the distribution renormalised by the ones before. The token is then drawn by inverting the
cumulative distribution at one uniform number, so a sequence uses exactly one random number per token, from a
``torch.Generator`` of its own: what it draws depends on its logits and its seed alone, never on its
neighbours in a batch, and the same on every device (the random numbers come from the CPU).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openxlstm.config import nearest_name


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen, and when to stop.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 256
    """Stop after this many tokens."""
    temperature: float = 0.8
    """Divides the logits; 1 samples what the model says, 0 always takes the most likely token."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely; 1 changes nothing. The
    beginning-of-sequence token is not counted as part of the prompt."""
    seed: int | None = None
    """Seed of the random numbers; None takes a fresh one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the result."""
    stop_at_eos: bool = True
    """End when the model writes the end-of-text token, which is not part of the result."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if _is_int(value):
                object.__setattr__(self, name, int(value))  # NumPy's integers become Python's
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if not _is_int(value) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (most likely token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps all tokens), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 (keeps all tokens) and 1, got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}"
            )
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be None or a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop must be texts of at least one character, got {self.stop!r}")

    def updated(self, **changes: Any) -> SamplingConfig:
        """A copy with some fields changed.

        Raises:
            ValueError: there is no such field, or a value is out of range.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ValueError(
                    f"unknown sampling option '{name}'.{nearest_name(name, names)} Valid: {', '.join(names)}"
                )
        return dataclasses.replace(self, **changes)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred before less likely.

    Args:
        logits: (..., V), floating.
        seen: (..., V), bool, True for tokens that occurred.
        penalty: positive; above 1 discourages, below 1 encourages repetition.

    Returns:
        (..., V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` largest logits of each row to -inf; ties with the k-th stay. 0 keeps all.

    logits (..., V) -> (..., V).
    """
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to ``p`` or more, the others become -inf.

    At least one token stays. logits (..., V) -> (..., V).
    """
    if p >= 1:
        return logits
    probabilities = logits.softmax(dim=-1)
    # tokens below (1 - p) / V sum to less than 1 - p, so the set is among the others: sort only those
    candidates = int((probabilities >= (1 - p) / logits.shape[-1]).sum(dim=-1).max())
    likely, order = probabilities.topk(max(candidates, 1), dim=-1)
    kept = likely.cumsum(dim=-1) - likely < p
    kept[..., 0] = True
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, kept)
    return logits.masked_fill(~mask, -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Set tokens less than ``min_p`` times as likely as the most likely one to -inf. (..., V) -> (..., V)."""
    if min_p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf)


def sampling_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The logits after penalty, temperature and filters; their softmax is what tokens are drawn from.

    Args:
        logits: (..., V), floating; computed in float32.
        config: with temperature 0 only the penalty applies.
        seen: (..., V), bool, tokens that occurred before; only needed for a repetition penalty.

    Returns:
        (..., V), float32.
    """
    logits = logits.float()
    if config.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits
    # subtracting the maximum first keeps tiny temperatures finite
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature
    logits = keep_top_k(logits, config.top_k)
    logits = keep_top_p(logits, config.top_p)
    return keep_min_p(logits, config.min_p)


class Sampler:
    """Draws the tokens of one sequence: a configuration, its random numbers, the tokens seen so far.

    Args:
        config: how to draw.
        vocab_size: V.

    Attributes:
        seed: the seed in use (the drawn one when ``config.seed`` is None), which reproduces the run.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int) -> None:
        self.config = config
        self.seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.generator = torch.Generator()
        self.seed: int
        self.reseed(config.seed)

    def reseed(self, seed: int | None) -> None:
        """Start the random numbers afresh from ``seed``, or from an unpredictable one."""
        self.seed = secrets.randbelow(2**63) if seed is None else operator.index(seed)
        self.generator.manual_seed(self.seed)

    def copy(self) -> Sampler:
        """An independent sampler that would draw the same tokens."""
        twin = Sampler(self.config.updated(seed=self.seed), self.seen.numel())
        twin.config = self.config
        twin.seen = self.seen.clone()
        twin.generator.set_state(self.generator.get_state())
        return twin

    def observe(self, *token_ids: int) -> None:
        """Count these tokens as seen, for the repetition penalty."""
        self.seen[list(token_ids)] = True

    def draw(self, logits: Tensor) -> int:
        """Choose the next token.

        Args:
            logits: (V,), any floating dtype and device.

        Raises:
            ValueError: the logits hold NaN or +inf, or are all -inf.
        """
        logits = logits.detach().to("cpu", torch.float32)
        if not math.isfinite(logits.max().item()):
            raise ValueError(
                "the model's logits are not finite: its weights are damaged or its numeric type overflows"
            )
        logits = sampling_logits(logits, self.config, self.seen)
        if self.config.temperature == 0:
            return int(logits.argmax())
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64)
        cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
        # right=True: a token of probability zero is never hit; scaling by the total leaves no gap at the end
        token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        return min(token, int(logits.isfinite().nonzero()[-1]))


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
