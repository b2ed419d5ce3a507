"""Which backend serves an operator call, and why the others do not.

Each operator has a table of backends. A backend says whether it can serve a request (device, dtype, ...) by
returning ``None`` or the reason why not. ``"auto"`` takes the first that can, in order of preference; asking
for one by name either gets exactly that one or an error with the reason. Nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from openxlstm.config import nearest_name


@dataclass(frozen=True)
class Request:
    """What an operator is asked for, as far as the choice of backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd follows an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator."""

    name: str
    implementation: Callable[..., Any]
    priority: int
    """Higher is preferred by ``"auto"``; zero or less is never chosen by ``"auto"``."""
    refuse: Callable[[Request], str | None]
    """Returns why the request cannot be served, or None."""
    description: str = ""
    automatic: Callable[[Request], bool] = lambda _: True
    """Whether ``"auto"`` may choose it for a request that it can serve."""


_TABLE: dict[str, list[Backend]] = {}


def _serves_all(_: Request) -> str | None:
    return None


def register(
    operator: str,
    name: str,
    implementation: Callable[..., Any],
    *,
    priority: int,
    refuse: Callable[[Request], str | None] = _serves_all,
    automatic: Callable[[Request], bool] = lambda _: True,
    description: str = "",
) -> None:
    """Add a backend to an operator's table."""
    backends = _TABLE.setdefault(operator, [])
    backends.append(Backend(name, implementation, priority, refuse, description, automatic))
    backends.sort(key=lambda b: -b.priority)


def _eligible(backend: Backend, request: Request) -> bool:
    return backend.priority > 0 and backend.automatic(request)


def resolve(operator: str, backend: str, request: Request) -> Backend:
    """Choose the backend for a request.

    Raises:
        ValueError: the named backend does not exist, or cannot serve this request.
    """
    backends = _TABLE[operator]
    if backend == "auto":
        for candidate in backends:
            if _eligible(candidate, request) and candidate.refuse(request) is None:
                return candidate
        raise ValueError(f"no backend of {operator} can serve this call:\n{explain(operator, request)}")
    for candidate in backends:
        if candidate.name == backend:
            reason = candidate.refuse(request)
            if reason is not None:
                raise ValueError(f"backend '{backend}' of {operator} cannot serve this call: {reason}")
            return candidate
    names = [b.name for b in backends]
    raise ValueError(
        f"unknown backend '{backend}' for {operator}.{nearest_name(backend, names)} "
        f"Choose 'auto' or one of: {', '.join(names)}"
    )


def backends(operator: str) -> list[Backend]:
    """The backends of an operator, most preferred first."""
    if operator not in _TABLE:
        raise ValueError(
            f"unknown operator '{operator}'.{nearest_name(operator, _TABLE)} "
            f"Operators: {', '.join(sorted(_TABLE))}"
        )
    return list(_TABLE[operator])


def operators() -> list[str]:
    """Names of all operators that have backends."""
    return sorted(_TABLE)


def explain(
    operator: str,
    request: Request | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> str:
    """Say which backend ``"auto"`` would run for a request, and why the others would not.

    Args:
        operator: such as ``"mlstm"``.
        request: the request; or give ``device``, ``dtype`` and the operator's ``options``.

    Returns:
        One line per backend, most preferred first.
    """
    request = request or Request(torch.device(device), dtype, options)
    lines, chosen = [], False
    for b in backends(operator):
        reason = b.refuse(request)
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif not _eligible(b, request):
            verdict = "can, when asked for by name"
        elif chosen:
            verdict = "can, but a preferred one is chosen"
        else:
            verdict, chosen = "chosen by 'auto'", True
        lines.append(f"{operator}/{b.name}: {verdict}" + (f" ({b.description})" if b.description else ""))
    return "\n".join(lines)
