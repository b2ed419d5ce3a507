"""Designs of a study: which models of which size to train for how long, for budgets of compute.

Two experiments: IsoFLOP profiles (at each budget, sizes on both sides of the expected optimum) and a grid of
tokens per parameter (each size at several ratios, for over-training). Learning rates and batch sizes are
assumptions, stated in the report:

* below 80 million parameters and 1e18 FLOPs the compute laws of DeepSeek LLM (Bi et al. 2024,
  arXiv 2401.02954): rate 0.3118 C^-0.1250, tokens per batch 0.2920 C^0.3271;
* otherwise the peak rates and batches of the published xLSTM study (arXiv 2510.02228), interpolated
  in the logarithm of the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from openxlstm.models import TransformerLMConfig, build_config, parameter_count, xLSTMLargeConfig
from openxlstm.models.accounting import training_flops_per_token

Family = Literal["xlstm", "transformer"]
FAMILIES: dict[str, str] = {"xlstm": "xlstm_large", "transformer": "transformer_lm"}
"""Family -> model type."""
PUBLISHED_RATES = ((1.6e8, 3e-3), (4.0e8, 3e-3), (8.3e8, 1e-3), (1.4e9, 8e-4), (2.7e9, 7e-4), (7e9, 5e-4))
PUBLISHED_BATCHES = ((4.0e8, 2**20), (8.3e8, 2**21), (1.4e9, 2**21), (2.7e9, 2**22), (7e9, 2**22))
SMALLEST_PUBLISHED = 8e7
LEAST_PUBLISHED = 1e18
SHAPE = ("embedding_dim", "num_heads", "num_blocks", "vocab_size", "ffn_round_up_to_multiple_of")
RATIO = 20.0
"""Tokens per parameter that profiles are centred on (Hoffmann et al. 2022)."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    experiment: Literal["isoflop", "tokenparam"]
    family: str
    model: dict[str, Any]
    """model_type and the fields of its configuration."""
    num_params: int
    flops: float
    """Forward and backward over the whole run."""
    budget: float
    """Nominal FLOPs it was designed for."""
    preset_ratio: str
    """Intended tokens per parameter; "" in profiles."""
    context_length: int
    batch_size: int
    """Sequences per step."""
    steps: int
    learning_rate: float

    @property
    def num_tokens(self) -> int:
        """D."""
        return self.steps * self.batch_size * self.context_length

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def recommended_rate(num_params: float, flops: float) -> float:
    """Peak learning rate: an assumption, see the module's text."""
    if num_params < SMALLEST_PUBLISHED and flops < LEAST_PUBLISHED:
        return float(f"{0.3118 * flops**-0.1250:.2g}")
    return float(f"{_interpolate(num_params, PUBLISHED_RATES):.2g}")


def recommended_batch(num_params: float, flops: float) -> float:
    """Tokens per step: an assumption, see the module's text."""
    if num_params < SMALLEST_PUBLISHED and flops < LEAST_PUBLISHED:
        return 0.2920 * flops**0.3271
    return _interpolate(num_params, PUBLISHED_BATCHES)


def _interpolate(x: float, table: Sequence[tuple[float, float]]) -> float:
    sizes, values = np.log(np.array(table)).T
    return float(np.exp(np.interp(math.log(x), sizes, values)))


def shapes(family: str, vocab_size: int) -> list[xLSTMLargeConfig | TransformerLMConfig]:
    """Models of growing size and published proportions: the width over the depth grows slowly.

    Widths are multiples of 8, larger ones of 16, 32, 64 and 128. Below a width of 128 the feed-forward is
    rounded to multiples of 16, so that small models differ in size by small steps.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: use {' or '.join(FAMILIES)}")
    configs: list[xLSTMLargeConfig | TransformerLMConfig] = []
    widths = [
        *range(8, 64, 8),
        *range(64, 128, 16),
        *range(128, 512, 32),
        *range(512, 1024, 64),
        *range(1024, 8192, 128),
        *range(8192, 20481, 512),
    ]
    for width in widths:
        depth = max(2, round(min(width / 48, 24 + (width - 1152) / 256)))
        multiple = 16 if width < 128 else 64
        if family == "xlstm":
            heads = next(h for h in (4, 5, 6, 7, 8, 3, 2, 1) if width % (4 * h) == 0)
            heads = heads if width >= 128 else 2
            config = xLSTMLargeConfig(width, heads, depth, vocab_size, ffn_round_up_to_multiple_of=multiple)
            configs.append(config)
        else:
            target = 32 if width < 256 else 64 if width < 2048 else 128
            heads = next(
                h for h in sorted(range(1, width // 8 + 1), key=lambda h: abs(width / h - target))
                if width % (2 * h) == 0
            )  # fmt: skip
            config = TransformerLMConfig(
                width, heads, depth, vocab_size, ffn_round_up_to_multiple_of=multiple
            )
            configs.append(config)
    return configs


def design(
    budgets: Sequence[float],
    *,
    families: Sequence[str] = ("xlstm", "transformer"),
    sizes: int = 5,
    spread: float = 4.0,
    ratios: Sequence[float] = (),
    grid_sizes: int = 3,
    vocab_size: int,
    context_length: int,
) -> list[PlannedRun]:
    """All runs of a study.

    Args:
        budgets: FLOPs of each IsoFLOP profile.
        families: ``"xlstm"``, ``"transformer"``.
        sizes: models per profile, at least 3.
        spread: the largest size of a profile over its centre, and the centre over the smallest.
        ratios: tokens per parameter of the grid; none leaves it out.
        grid_sizes: models of the grid, from those of the profiles.
        vocab_size: of the tokenizer.
        context_length: tokens per sequence.

    Raises:
        ValueError: a number that makes no sense, or a budget too small for any model.
    """
    _check(budgets, sizes, spread, ratios, grid_sizes, context_length)
    runs: list[PlannedRun] = []
    for family in families:
        ladder = [(parameter_count(config), config) for config in shapes(family, vocab_size)]
        used: dict[int, Any] = {}
        for budget in sorted(budgets):
            centre = math.sqrt(budget / (6 * RATIO))
            chosen = _choose(ladder, centre / spread, centre * spread, sizes)
            if len(chosen) < 3:
                least = 6 * RATIO * (ladder[0][0] * spread) ** 2
                raise ValueError(
                    f"a budget of {budget:.3g} FLOPs is too small for a profile of {family} models with a "
                    f"vocabulary of {vocab_size}: the smallest has {ladder[0][0]:,} parameters; use at least "
                    f"{least:.1g} FLOPs, a larger --spread, or a smaller vocabulary"
                )
            for count, config in chosen:
                used[count] = config
                runs.append(_run("isoflop", family, config, budget, context_length))
        if ratios:
            smaller_half = sorted(used.items())[:: max(1, len(used) // (2 * grid_sizes))]
            for count, config in smaller_half[:grid_sizes]:
                for ratio in ratios:
                    flops = training_flops_per_token(config, context_length) * ratio * count
                    runs.append(_run("tokenparam", family, config, flops, context_length, ratio))
    return runs


def _check(
    budgets: Sequence[float],
    sizes: int,
    spread: float,
    ratios: Sequence[float],
    grid_sizes: int,
    context: int,
) -> None:
    for name, holds, value, expected in (
        ("budgets", budgets and all(0 < b < math.inf for b in budgets), budgets, "positive numbers of FLOPs"),
        ("sizes", sizes >= 3, sizes, "at least 3, for a parabola"),
        ("spread", spread > 1, spread, "above 1"),
        ("ratios", all(0 < r < math.inf for r in ratios), ratios, "positive tokens per parameter"),
        ("grid_sizes", grid_sizes >= 1, grid_sizes, "at least 1"),
        ("context_length", context >= 1, context, "at least 1"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {value}")


def _choose(ladder: list[tuple[int, Any]], low: float, high: float, count: int) -> list[tuple[int, Any]]:
    """Different models nearest to ``count`` sizes evenly spread in the logarithm."""
    chosen: dict[int, Any] = {}
    for target in np.geomspace(low, high, count):
        size, config = min(ladder, key=lambda entry: abs(math.log(entry[0] / target)))
        chosen[size] = config
    return sorted(chosen.items())


def _run(
    experiment: Literal["isoflop", "tokenparam"],
    family: str,
    config: Any,
    budget: float,
    context_length: int,
    ratio: float | None = None,
) -> PlannedRun:
    count = parameter_count(config)
    per_token = training_flops_per_token(config, context_length)
    tokens = budget / per_token
    batch = max(1, round(recommended_batch(count, budget) / context_length))
    batch = max(1, min(batch, round(tokens / context_length / 50)))  # at least about 50 steps
    steps = max(1, round(tokens / (batch * context_length)))
    model: dict[str, Any] = {
        "model_type": FAMILIES[family],
        **{name: getattr(config, name) for name in SHAPE},
    }
    label = f"C{budget:.0e}" if ratio is None else f"M{ratio:g}"
    return PlannedRun(
        f"{experiment}-{family}-{label}-N{count}".replace("+", ""),
        experiment,
        family,
        model,
        count,
        per_token * steps * batch * context_length,
        budget,
        "" if ratio is None else f"{ratio:g}",
        context_length,
        batch,
        steps,
        recommended_rate(count, budget),
    )


def planned_run(values: dict[str, Any]) -> PlannedRun:
    """The run that :meth:`PlannedRun.values` wrote.

    Raises:
        ValueError: it is not one, or its model is not.
    """
    try:
        run = PlannedRun(**values)
    except TypeError as error:
        raise ValueError(f"the design holds something that is not a run: {error}") from None
    build_config(run.model)
    return run
