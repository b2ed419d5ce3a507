"""What recurrent memory can and cannot do, measured: tasks, small networks, text, long prompts, a look
inside.

The names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openxlstm.lazy import lazy_names

if TYPE_CHECKING:
    from openxlstm.evaluation.context import foreign_past, loss_by_context, loss_by_position
    from openxlstm.evaluation.long_context import make_prompt, run_long_task
    from openxlstm.evaluation.probes import probe
    from openxlstm.evaluation.report import write_report
    from openxlstm.evaluation.study import run_study
    from openxlstm.evaluation.tasks import TASKS, get_task
    from openxlstm.evaluation.text import prepared_documents, score_stream, score_windows, text_documents
    from openxlstm.evaluation.trial import Trial, run_trial

__all__ = [
    "TASKS",
    "Trial",
    "foreign_past",
    "get_task",
    "loss_by_context",
    "loss_by_position",
    "make_prompt",
    "prepared_documents",
    "probe",
    "run_long_task",
    "run_study",
    "run_trial",
    "score_stream",
    "score_windows",
    "text_documents",
    "write_report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TASKS": "tasks",
        "Trial": "trial",
        "foreign_past": "context",
        "get_task": "tasks",
        "loss_by_context": "context",
        "loss_by_position": "context",
        "make_prompt": "long_context",
        "prepared_documents": "text",
        "probe": "probes",
        "run_long_task": "long_context",
        "run_study": "study",
        "run_trial": "trial",
        "score_stream": "text",
        "score_windows": "text",
        "text_documents": "text",
        "write_report": "report",
    },
)
