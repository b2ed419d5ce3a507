"""Learning-rate schedules: pure functions from the number of updates done to a factor of the peak rate.

A run of S updates has a warm-up of W, a cool-down of K and M = S - W - K between them. With r the final
factor and p = (step - W) / M the progress of the middle part, the factor for update number ``step``, counted
from 0, is

    warm-up       (step + 1) / W                       no update is wasted on a rate of zero
    cosine        r + (1 - r) (1 + cos(pi p)) / 2
    exponential   r ** p
    wsd, constant 1
    cool-down     linear from the middle part's last value: to r for wsd, to 0 for the others

"exponential" with a cool-down to zero is the published schedule of the 7B model, "cosine" that of the smaller
ones; "wsd" (warm-up, stable, decay) lets a run be continued from before its cool-down.
"""

from __future__ import annotations

import math

from openxlstm.training.config import ScheduleName, TrainerConfig


def schedule_factor(
    step: int,
    *,
    schedule: ScheduleName,
    steps: int,
    warmup: int = 0,
    cooldown: int = 0,
    final_factor: float = 0.1,
) -> float:
    """Factor of the peak learning rate for update number ``step``, counted from 0.

    Args:
        step: updates done before this one. Past the end of the run the last value is kept.
        schedule: course between warm-up and cool-down, see the module's docstring.
        steps, warmup, cooldown: updates of the whole run and of its two ends.
        final_factor: what is left at the end of the decay.
    """
    step = min(step, steps - 1)
    if step < warmup:
        return (step + 1) / warmup
    main = steps - warmup - cooldown
    done = step - warmup
    if done < main:
        return _main(schedule, done / main, final_factor)
    start = _main(schedule, 1.0, final_factor) if main else 1.0
    end = final_factor if schedule == "wsd" else 0.0
    return start + (end - start) * (done - main) / cooldown


def _main(schedule: ScheduleName, progress: float, final_factor: float) -> float:
    if schedule == "cosine":
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "exponential":
        return final_factor**progress
    return 1.0


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Learning rate for update number ``step`` (from 0) of the run that ``config`` describes."""
    return config.learning_rate * schedule_factor(
        step,
        schedule=config.schedule,
        steps=config.steps,
        warmup=config.warmup,
        cooldown=config.cooldown,
        final_factor=config.final_factor,
    )
