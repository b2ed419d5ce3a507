"""openxlstm: the xLSTM family in one library, exact and fast.

The names below are loaded when they are first used, so ``import openxlstm`` costs next to nothing:

* :func:`load_pretrained`, :func:`save_pretrained`: any published xLSTM checkpoint, in and out.
* :class:`Generator`: sample from a language model, streaming or in batches, with a resumable state.
* the subpackages ``ops``, ``layers``, ``models``, ``checkpoint``, ``data``, ``training``, ``inference``,
  ``evaluation``, ``scaling`` and the modules ``config``, ``state``, ``runtime``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openxlstm.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from openxlstm import (
        checkpoint,
        config,
        data,
        evaluation,
        inference,
        layers,
        models,
        ops,
        runtime,
        scaling,
        state,
        training,
    )
    from openxlstm.checkpoint import load_pretrained, save_pretrained
    from openxlstm.inference import Generator

__all__ = [
    "Generator",
    "__version__",
    "checkpoint",
    "config",
    "data",
    "evaluation",
    "inference",
    "layers",
    "load_pretrained",
    "models",
    "ops",
    "runtime",
    "save_pretrained",
    "scaling",
    "state",
    "training",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **{name: name for name in __all__ if name.islower() and not name.startswith("_")},
        "Generator": "inference",
        "load_pretrained": "checkpoint",
        "save_pretrained": "checkpoint",
    },
)
