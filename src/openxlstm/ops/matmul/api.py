"""The product of two matrices, by whatever computes it fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.matmul import native

OPERATOR = "matmul"


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``a @ b + bias``.

    Args:
        a: (M, K).
        b: (K, N), of the dtype of ``a``.
        bias: (N), or None.
        backend: ``"auto"``, ``"native"`` (float32 on CPUs) or ``"portable"``.

    Returns:
        (M, N), in the dtype of the matrices. Differentiable.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot serve the call.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matrices (M, K) and (K, N) are needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"bias must be ({b.shape[1]},) for these matrices, got {tuple(bias.shape)}")
    request = dispatch.Request(a.device, a.dtype, {"rows": a.shape[0]})
    return dispatch.resolve(OPERATOR, backend, request).implementation(a, b, bias)


def portable(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's product."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


dispatch.register(
    OPERATOR,
    "native",
    native.native,
    priority=20,
    refuse=native.refuse,
    automatic=native.automatic,
    description="C++, all vector units of processors where PyTorch leaves some idle",
)
dispatch.register(OPERATOR, "portable", portable, priority=10, description="PyTorch")
