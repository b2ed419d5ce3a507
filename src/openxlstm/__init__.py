"""openxlstm: the xLSTM family in one library, exact and fast.

The names below are loaded when they are first used, so ``import openxlstm`` costs next to nothing:

* :func:`load_pretrained`, :func:`save_pretrained`: any published xLSTM checkpoint, in and out.
* :class:`Generator`: sample from a language model, streaming or in batches, with a resumable state.
* the subpackages ``ops``, ``layers``, ``models``, ``checkpoint``, ``data``, ``training``, ``inference``
  and the modules ``config``, ``state``, ``runtime``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from openxlstm import checkpoint, config, data, inference, layers, models, ops, runtime, state, training
    from openxlstm.checkpoint import load_pretrained, save_pretrained
    from openxlstm.inference import Generator

__all__ = [
    "Generator",
    "__version__",
    "checkpoint",
    "config",
    "data",
    "inference",
    "layers",
    "load_pretrained",
    "models",
    "ops",
    "runtime",
    "save_pretrained",
    "state",
    "training",
]

_HOME = {
    "load_pretrained": "openxlstm.checkpoint",
    "save_pretrained": "openxlstm.checkpoint",
    "Generator": "openxlstm.inference",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"openxlstm.{name}")
    else:
        raise AttributeError(f"module 'openxlstm' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
