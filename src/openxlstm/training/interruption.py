"""Stopping politely: the first Ctrl-C or SIGTERM finishes the step and saves, the second quits at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ANNOUNCEMENT = b"\nstopping after this step; press Ctrl-C again to quit at once without saving\n"


class TrainingInterrupted(KeyboardInterrupt):
    """A run was asked to stop, finished its step and saved. Its text says how to resume.

    Attributes:
        step: updates done.
        checkpoint: where everything was saved.
    """

    def __init__(self, message: str, step: int, checkpoint: Path) -> None:
        super().__init__(message)
        self.step = step
        self.checkpoint = checkpoint


class StopRequest:
    """While entered, SIGINT and SIGTERM set :attr:`received` instead of ending the process.

    The second signal is an ordinary :class:`KeyboardInterrupt`. Outside the main thread, where Python
    delivers no signals, entering changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt("stopped at once; what came after the last checkpoint is lost")
        self.received = signal.Signals(number)
        with contextlib.suppress(OSError):  # not through sys.stderr, which may be in the middle of a write
            os.write(2, ANNOUNCEMENT)
