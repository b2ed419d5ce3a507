"""Named sets of trials: what ``openxlstm eval state-tracking`` and ``openxlstm eval compare`` run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openxlstm.evaluation.networks import get_network, width_for
from openxlstm.evaluation.tasks import get_task
from openxlstm.evaluation.tasks.recall import MultiQueryRecall
from openxlstm.evaluation.trial import Trial

TRADE_OFF_TASKS = ("parity", "s3", "mqar-small")
COMPARED_MODELS = (
    "slstm",
    "slstm-no-recurrence",
    "mlstm",
    "xlstm-1-1",
    "lstm",
    "gru",
    "transformer",
)


def trade_off(seeds: Sequence[int] = (0,)) -> list[Trial]:
    """Both halves of the trade-off: memory mixing tracks states, matrix memory recalls.

    One sLSTM block, the same block without recurrence, and two mLSTM blocks on parity and S3; two blocks of
    each kind on small multi-query recall. Settings are those of the table below; nothing is tuned per
    network.
    """
    xlstms = ("slstm", "slstm-no-recurrence", "mlstm")
    recall = lengths("mqar-small")
    trials: list[Trial] = []
    for seed in seeds:
        trials += [Trial("parity", model, width=32, steps=400, seed=seed) for model in xlstms]
        trials += [Trial("s3", model, width=64, steps=500, seed=seed) for model in xlstms]
        trials += [
            Trial("mqar-small", model, width=64, blocks=2, steps=350, seed=seed, **recall)
            for model in ("mlstm", "slstm")
        ]
    return trials


def slow_state_tracking(seeds: Sequence[int] = (0,)) -> list[Trial]:
    """What one sLSTM block needs longer for, or does not solve, and parity with one answer per string, as
    published."""
    trials: list[Trial] = []
    for seed in seeds:
        trials += [
            Trial("cycle-navigation", "slstm", width=64, steps=2000, seed=seed),
            Trial(
                "modular-arithmetic",
                "slstm",
                width=64,
                steps=3000,
                learning_rate=1e-2,
                seed=seed,
                **lengths("modular-arithmetic"),
            ),
            Trial("s5", "slstm", width=64, steps=3000, seed=seed),
            Trial("parity", "slstm", width=32, protocol="last", steps=2000, seed=seed),
        ]
    return trials


def lengths(task: str) -> dict[str, Any]:
    """The lengths a task is usually trained and tested on, as fields of a trial."""
    found = get_task(task)
    if isinstance(found, MultiQueryRecall):
        length = {"mqar-small": 48}.get(task, max(64, 4 * found.pairs))
        return {"train_lengths": (length, length), "test_lengths": ((length, length),)}
    low = max(3, found.shortest)
    if found.longest is not None:
        return {"train_lengths": (low, 40), "test_lengths": ((low, 40), (40, found.longest))}
    if "output" in found.protocols:
        return {"train_lengths": (low, 40), "test_lengths": ((low, 40), (40, 256))}
    longest = 2048 if found.lengths(2047, 2048)[-1] == 2048 else 2047
    return {"train_lengths": (low, 40), "test_lengths": ((low, 40), (40, 256), (longest, longest))}


def comparison(
    models: Sequence[str], tasks: Sequence[str], *, seeds: int, steps: int, parameters: int, **settings: Any
) -> list[Trial]:
    """Every network on every task, with the width that brings it nearest to ``parameters``.

    Args:
        models, tasks: names.
        seeds: how many, from 0.
        steps: updates of every trial.
        parameters: trainable parameters to come near to.
        **settings: further fields of :class:`Trial`, the same for all.

    Raises:
        ValueError: unknown names, no seeds, or fewer parameters than a network needs.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    trials: list[Trial] = []
    for task in (get_task(name).name for name in tasks):
        for model in (get_network(name).name for name in models):
            width = width_for(model, get_task(task).vocab_size, parameters)
            fields = {**lengths(task), **settings}
            trials += [Trial(task, model, width=width, steps=steps, seed=n, **fields) for n in range(seeds)]
    return trials
