"""The convention of stateful calls: ``y``, or ``(y, state)`` when the state was asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_state(result: Any, return_state: bool) -> tuple[Tensor, Any]:
    """Turn the result of a call with ``return_state`` into (y, state), where state may be None."""
    return result if return_state else (result, None)
