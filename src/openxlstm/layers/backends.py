"""The backend that a configuration names in ``ops_backend``: is there one, and what it means for a step."""

from __future__ import annotations

from openxlstm.config import nearest_name
from openxlstm.ops import dispatch


def check_backend(operator: str, backend: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor a backend of ``operator``.

    Raises:
        ValueError: with the nearest name and all names.
    """
    names = ["auto", *(b.name for b in dispatch.backends(operator))]
    if backend not in names:
        raise ValueError(
            f"ops_backend: unknown backend '{backend}' for {operator}.{nearest_name(backend, names)} "
            f"Choose one of: {', '.join(names)}"
        )


def step_backend(operator: str, backend: str) -> str:
    """What ``backend`` means for the step ``operator``: itself, or ``"auto"`` where it has none such."""
    return backend if any(b.name == backend for b in dispatch.backends(operator)) else "auto"


def companion_backend(backend: str) -> str:
    """What the ``backend`` of a layer's main operator means for the smaller ones beside it.

    Compiled kernels where those may be chosen; plain PyTorch, which has any number of derivatives, where
    something else was asked for. The Triton kernels beside "triton" have no gradient, so "auto" decides.
    """
    return {"auto": "auto", "native": "native", "triton": "auto"}.get(backend, "portable")
