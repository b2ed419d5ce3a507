"""Linear maps with quantised weights: ``y = round(x) @ dequantize(W).T + b``.

The activations are rounded too, each vector to integers of 16 or 8 bits with a scale of its own:

    round(x) = code * max|x| / limit,   code = nearest(x * (limit / max|x|)),   limit = 32767 or 127

16 bits round fifty times finer than bfloat16, so the weights alone make the error; they let the native
kernels multiply integers. 8 bits are for prompts on processors with byte products. A vector with a number
that is not finite gives NaN, one with nothing above 1e-30 gives zero. Gradients pass the rounding unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from openxlstm.ops import dispatch
from openxlstm.ops.dispatch import Request
from openxlstm.ops.quantization import native
from openxlstm.ops.quantization.codes import check_packed, dequantize, limit_of

LEAST_ACTIVATION = 1e-30
OPERATOR = "quantized_linear"


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation_bits: int = 16,
    backend: str = "auto",
) -> Tensor:
    """Multiply with a packed matrix, under autocast in the autocast dtype.

    Args:
        x: (..., in), any floating dtype.
        codes, scales: packed (out, in) matrix from :func:`openxlstm.ops.quantization.quantize`.
        bias: (out), or None.
        activation_bits: 16 or 8, see the module.
        backend: ``"auto"``, ``"native"`` or ``"portable"``.

    Returns:
        (..., out) in the dtype of ``x``. With ``backend="native"`` a vector's result does not depend on the
        others, bit for bit, among calls of up to 8 vectors and among calls of more.

    Raises:
        ValueError: tensors that do not fit, other activation bits, a backend that cannot serve the call.
    """
    limit_of(activation_bits)
    if not x.is_floating_point() or not x.ndim:
        raise ValueError(f"x must be floating point vectors (..., in), got {x.dtype} {tuple(x.shape)}")
    check_packed(codes, scales, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    request = Request(x.device, x.dtype, {"needs_grad": needs_grad})
    y = dispatch.resolve(OPERATOR, backend, request).implementation(x, codes, scales, activation_bits)
    return y if bias is None else y + bias.to(y.dtype)


def round_activations(x: Tensor, bits: int) -> Tensor:
    """``x`` rounded to integers of ``bits`` bits times a scale, see the module; float32 or float64."""
    limit = limit_of(bits)
    numbers = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    most = numbers.abs().amax(-1, keepdim=True)
    most = torch.where(torch.isfinite(most), most, torch.nan)
    usable = most >= LEAST_ACTIVATION
    # not "limit / ...": PyTorch multiplies a number by the rounded reciprocal
    factor = torch.full_like(most, limit) / torch.where(usable, most, 1.0)
    rounded = torch.where(usable, (numbers * factor).round(), 0.0) * (most / limit)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def portable(x: Tensor, codes: Tensor, scales: Tensor, activation_bits: int) -> Tensor:
    """The definition: dequantise, and multiply in at least float32. Differentiable in ``x``."""
    numbers = round_activations(x, activation_bits)
    with torch.autocast(x.device.type, enabled=False):
        weight = dequantize(codes, scales, x.shape[-1]).to(numbers.dtype)
        return functional.linear(numbers, weight).to(x.dtype)


dispatch.register(
    OPERATOR,
    "native",
    native.linear,
    priority=20,
    refuse=native.refuse,
    description="weights stay packed, integer products",
)
dispatch.register(
    OPERATOR,
    "portable",
    portable,
    priority=10,
    description="expands the matrix at every call; differentiable",
)
