"""Training: settings, schedules, the loop, exact checkpoints, logs."""

from openxlstm.training.checkpointing import Checkpoint, CheckpointStore
from openxlstm.training.config import TrainerConfig
from openxlstm.training.interruption import TrainingInterrupted
from openxlstm.training.logging import read_log
from openxlstm.training.resumption import refuse_existing_run
from openxlstm.training.schedules import learning_rate, schedule_factor
from openxlstm.training.trainer import NonFiniteLossError, Trainer, TrainingResult

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "NonFiniteLossError",
    "Trainer",
    "TrainerConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "learning_rate",
    "read_log",
    "refuse_existing_run",
    "schedule_factor",
]
