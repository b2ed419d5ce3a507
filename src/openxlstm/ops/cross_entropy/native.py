"""Backend ``native`` of :func:`openxlstm.ops.linear_cross_entropy`: each row of logits in one sweep."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import loader


class _Arguments(ctypes.Structure):
    """``CrossEntropy`` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "losses")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rows_per_task")),
        ("bfloat16", ctypes.c_int32),
        ("gradients", ctypes.c_int32),
        ("cap", ctypes.c_float),
    )


def refuse(request: Request) -> str | None:
    """Why the native sweep cannot serve a request, or None."""
    if request.dtype == torch.float16:
        return "computes in float32 and bfloat16, not float16"
    return loader.refuse(request, differentiable=True)


def losses_and_gradients(logits: Tensor, targets: Tensor, soft_cap: float | None, gradients: bool) -> Tensor:
    """As :func:`openxlstm.ops.cross_entropy.api.portable`."""
    losses = torch.empty(logits.shape[0])
    low = logits.dtype == torch.bfloat16
    if logits.numel():
        a = _Arguments(
            logits.data_ptr(),
            targets.data_ptr(),
            losses.data_ptr(),
            *logits.shape,
            0,
            low,
            gradients,
            soft_cap or 0.0,
        )
        loader.call("oxl_cross_entropy", a)
    return losses
