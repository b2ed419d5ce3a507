"""What follows a recurrent operator in both model families: a norm of every head, a skip path, a gate.

u = (x - mean) / sqrt(var + eps)   over each head; without ``center``: u = x / sqrt(mean(x^2) + eps)
y = ((weight_offset + weight) * u + bias + skip_weight * skip) * act(gate)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.gpu import support
from openxlstm.ops.normalization import native, portable, triton_backend

Activation = Literal["sigmoid", "silu"]

dispatch.register(
    "head_norm", "portable", portable.head_norm, priority=10, description="PyTorch, differentiable"
)
dispatch.register(
    "head_norm",
    "native",
    native.head_norm,
    priority=20,
    refuse=native.refuse,
    description="C++, one pass, exact hand-written backward",
)
dispatch.register(
    "head_norm",
    "triton",
    triton_backend.head_norm,
    priority=30,
    refuse=triton_backend.refuse,
    automatic=support.automatic,
    description="one GPU kernel, for decoding and prefill",
)


def head_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    center: bool = True,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    activation: Activation = "sigmoid",
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    widen: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Normalise every head on its own, then scale, add and gate all channels.

    Args:
        x: (..., H, D).
        weight, bias: (H D), or None for 1 and 0.
        weight_offset: added to ``weight``; 1 where weights are stored as their difference from 1.
        center: subtract the mean (LayerNorm); else divide by the root mean square only (RMSNorm).
        eps: added to the variance or mean square.
        gate: (..., H D), before its activation; None for none.
        activation: of the gate.
        skip: (..., H D), added before the gate, times ``skip_weight`` (H D) if given.
        widen: normalise in float32 at least. The backends ``native`` and ``triton`` always do.
        backend: ``"auto"`` or a name; see :func:`openxlstm.ops.explain`.

    Returns:
        y (..., H D), in the dtype that PyTorch gives the product of the tensors.

    Raises:
        ValueError: shapes that do not fit, or an unknown or impossible backend.
    """
    _check(x, weight, bias, gate, skip, skip_weight, activation)
    options = {
        "needs_grad": dispatch.needs_grad(x, weight, bias, gate, skip, skip_weight),
        "head_dim": x.shape[-1],
    }
    run = dispatch.resolve("head_norm", backend, dispatch.Request(x.device, x.dtype, options)).implementation
    return run(
        x, weight, bias, weight_offset, center, eps, gate, activation == "silu", skip, skip_weight, widen
    )  # fmt: skip


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    activation: str,
) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape (..., H, D), got {x.dtype} {tuple(x.shape)}")
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f"activation must be 'sigmoid' or 'silu', got '{activation}'")
    if skip_weight is not None and skip is None:
        raise ValueError("skip_weight scales skip, which was not given")
    width = x.shape[-2] * x.shape[-1]
    vectors = {"weight": weight, "bias": bias, "skip_weight": skip_weight}
    rows = {"gate": gate, "skip": skip}
    for tensors, shape in ((vectors, (width,)), (rows, (*x.shape[:-2], width))):
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
