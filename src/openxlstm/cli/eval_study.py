"""``openxlstm eval state-tracking``, ``compare``, ``task`` and ``tasks``: small networks trained on tasks."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openxlstm.cli.options import parse


@dataclass(frozen=True)
class StateTrackingOptions:
    """Show both halves of the trade-off: an sLSTM tracks states, an mLSTM recalls.

    Trains one sLSTM block, the same block without recurrence and two mLSTM blocks on parity and on products
    of permutations (S3), strings of 3 to 40, and measures them at 40 to 256 and at 2,048; then sLSTM and
    mLSTM on associative recall. Writes a report. Run again after an interruption, it goes on. A seed takes
    two minutes on two cores.
    """

    output: Path = Path("runs/state-tracking")
    """Directory of results and report."""
    seeds: int = 1
    """Runs per setting, from seeds 0, 1, ..."""
    slow: bool = False
    """Instead what one sLSTM block does not solve in a few thousand steps: cycle navigation, modular
    arithmetic, S5, and parity with one answer per string (four minutes on two cores)."""
    processes: int | None = None
    """Trials at a time; as many as threads unless given."""


@dataclass(frozen=True)
class CompareOptions:
    """Train and evaluate a set of networks under equal data, parameters and steps, over several seeds.

    Writes a table with confidence intervals, plots, and an HTML report that needs nothing else. Run again
    after an interruption, it goes on.
    """

    models: tuple[str, ...] = ()
    """Networks; all but xlstm-3-1 and mamba (seconds per step on a CPU) unless given. `openxlstm eval tasks`
    lists them."""
    tasks: tuple[str, ...] = ("parity", "s3", "mqar-small")
    """Tasks."""
    output: Path = Path("runs/compare")
    """Directory of results and report."""
    seeds: int = 3
    """Runs per network and task."""
    steps: int = 400
    """Updates of every run."""
    parameters: int = 50_000
    """Trainable parameters that every network comes near to by its width."""
    batch_size: int = 128
    """Strings per update."""
    learning_rate: float = 3e-3
    """Peak learning rate of every run."""
    processes: int | None = None
    """Trials at a time; as many as threads unless given."""


@dataclass(frozen=True)
class TaskOptions:
    """Train one network on one task, and measure its accuracy by length."""

    task: Annotated[str, Positional, arg(metavar="TASK")]
    """Name of a task; `openxlstm eval tasks` lists them."""
    model: str = "slstm"
    """Name of a network."""
    width: int = 32
    """Its width."""
    blocks: int | None = None
    """Its number of blocks; its own unless given."""
    protocol: str | None = None
    """Where answers are asked: last, every or output; the task's own unless given."""
    train_lengths: tuple[int, int] | None = None
    """Shortest and longest training string."""
    test_lengths: tuple[int, int] | None = None
    """Shortest and longest test string; several ranges unless given."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 128
    """Strings per update."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Of initial values and training data."""
    output: Path = Path("runs/tasks")
    """Directory of results; a finished trial is not run again."""


@dataclass(frozen=True)
class TasksOptions:
    """List the tasks and the networks."""


EXAMPLES = {
    "state-tracking": """\
  openxlstm eval state-tracking
  openxlstm eval state-tracking --slow --output runs/slow""",
    "compare": """\
  openxlstm eval compare
  openxlstm eval compare --models slstm lstm gru --tasks parity cycle-navigation --seeds 5""",
    "task": """\
  openxlstm eval task parity --model slstm
  openxlstm eval task mqar-small --model mlstm --width 64 --steps 350""",
    "tasks": "  openxlstm eval tasks",
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one of the commands."""
    kinds: dict[str, Any] = {
        "state-tracking": (StateTrackingOptions, _state_tracking),
        "compare": (CompareOptions, _compare),
        "task": (TaskOptions, _task),
        "tasks": (TasksOptions, _tasks),
    }
    options, action = kinds[name]
    return action(parse(options, arguments, command=f"eval {name}", examples=EXAMPLES[name]), arguments)


def _state_tracking(options: StateTrackingOptions, arguments: Sequence[str]) -> int:
    from openxlstm.evaluation.presets import slow_state_tracking, trade_off

    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    trials = (slow_state_tracking if options.slow else trade_off)(range(options.seeds))
    title = "State tracking, the slower settings" if options.slow else "Memory mixing and matrix memory"
    return _study(trials, options, title, ["openxlstm", "eval", "state-tracking", *arguments])


def _compare(options: CompareOptions, arguments: Sequence[str]) -> int:
    from openxlstm.evaluation.presets import COMPARED_MODELS, comparison

    trials = comparison(
        options.models or COMPARED_MODELS,
        options.tasks,
        seeds=options.seeds,
        steps=options.steps,
        parameters=options.parameters,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    return _study(trials, options, "Networks compared", ["openxlstm", "eval", "compare", *arguments])


def _study(trials: Sequence[Any], options: Any, title: str, words: Sequence[str]) -> int:
    from openxlstm.evaluation.report import summarise, table, write_report
    from openxlstm.evaluation.study import run_study

    command = shlex.join(words)
    try:
        results = run_study(trials, options.output, processes=options.processes, report=_say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is kept; `{command}` goes on") from None
    page = write_report(results, options.output, title=title, command=command)
    print(table(summarise(results)))
    print(f"\nreport: {page}")
    return 0


def _task(options: TaskOptions, arguments: Sequence[str]) -> int:
    from openxlstm.evaluation.networks import available
    from openxlstm.evaluation.presets import lengths
    from openxlstm.evaluation.report import summarise, table
    from openxlstm.evaluation.study import run_study
    from openxlstm.evaluation.tasks import get_task
    from openxlstm.evaluation.trial import Trial

    fields = {f.name for f in dataclasses.fields(Trial)} & {f.name for f in dataclasses.fields(TaskOptions)}
    values: dict[str, Any] = {name: getattr(options, name) for name in fields} | {
        "task": get_task(options.task).name
    }
    usual = lengths(values["task"])
    if options.train_lengths is None:
        values["train_lengths"] = usual["train_lengths"]
    values["test_lengths"] = (
        usual["test_lengths"] if options.test_lengths is None else (options.test_lengths,)
    )
    trial = Trial(**values)
    if reason := available(trial.model):
        raise ValueError(f"{trial.model} cannot run here: {reason}")
    results = run_study([trial], options.output, processes=1, report=_say)
    print(table(summarise(results)))
    return 0


def _tasks(options: TasksOptions, arguments: Sequence[str]) -> int:
    from openxlstm.evaluation.networks import NETWORKS
    from openxlstm.evaluation.tasks import TASKS

    width = max(map(len, TASKS))
    print("tasks (protocols, tokens, chance):")
    for name, task in TASKS.items():
        about = f"{'/'.join(task.protocols)}, {task.vocab_size}, {task.chance:.3g}"
        print(f"  {name:<{width}}  {task.summary} ({about})")
    print("\nnetworks (blocks):")
    for name, network in NETWORKS.items():
        print(f"  {name:<{width}}  {network.summary} ({network.blocks})")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
