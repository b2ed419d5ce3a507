"""Tasks by name: :data:`TASKS`, :func:`get_task`."""

from __future__ import annotations

from openxlstm.config import nearest_name
from openxlstm.evaluation.tasks.arithmetic import ModularArithmetic, ModularArithmeticBrackets, SolveEquation
from openxlstm.evaluation.tasks.recall import Copying, Induction, MultiQueryRecall, NearestNeighbour
from openxlstm.evaluation.tasks.regular import CycleNavigation, EvenPairs, Parity, WordProblem
from openxlstm.evaluation.tasks.strings import (
    BucketSort,
    DuplicateString,
    Majority,
    MajorityCount,
    MissingDuplicate,
    ReverseString,
)
from openxlstm.evaluation.tasks.task import Task, TaskBatch

STATE_TRACKING: tuple[Task, ...] = (
    Parity(),
    EvenPairs(),
    CycleNavigation(),
    ModularArithmetic(),
    ModularArithmeticBrackets(),
    SolveEquation(),
    WordProblem(3),
    WordProblem(5),
    Majority(),
    MajorityCount(),
    BucketSort(),
    MissingDuplicate(),
    ReverseString(),
    DuplicateString(),
)
RECALL: tuple[Task, ...] = (
    MultiQueryRecall("mqar-small", pairs=8, vocab_size=128),
    *(MultiQueryRecall(f"mqar-{pairs}", pairs=pairs) for pairs in (4, 8, 16, 32, 48, 64, 96, 256)),
    Copying(),
    Induction(),
    NearestNeighbour(),
)
TASKS: dict[str, Task] = {task.name: task for task in (*STATE_TRACKING, *RECALL)}
"""Name to task."""


def get_task(name: str) -> Task:
    """The task of that name; underscores count as hyphens.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    key = name.lower().replace("_", "-")
    if key not in TASKS:
        raise ValueError(f"unknown task {name!r}.{nearest_name(key, TASKS)} Tasks: {', '.join(TASKS)}")
    return TASKS[key]


__all__ = ["RECALL", "STATE_TRACKING", "TASKS", "Task", "TaskBatch", "get_task"]
