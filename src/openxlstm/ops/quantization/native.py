"""Backend ``native`` of :func:`openxlstm.ops.quantized_linear`: products of packed matrices on CPUs.

``openxlstm::quantized_linear_native`` rounds the activations once, then multiplies integers: up to eight
vectors (decoding) read every weight once from memory and expand it in registers; more (prompts) run through
tiles, in bytes where activations have 8 bits and the processor multiplies bytes. It computes in float32
around the integers. It has no gradient; the backend ``portable`` has.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import loader
from openxlstm.ops.products import INT4, INT8, Weight
from openxlstm.ops.quantization.codes import check_packed, limit_of


class _Arguments(ctypes.Structure):
    """``QuantizedProduct`` of native/kernels.h."""

    _fields_ = (
        ("weight", Weight),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("limit", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "sums")),
        *((name, ctypes.c_int64) for name in ("stride", "code_bytes")),
        *((name, ctypes.c_int64) for name in ("vectors_per_task", "vector_scratch")),
        *((name, ctypes.c_int64) for name in ("rows_per_task", "row_scratch")),
    )


def refuse(request: Request) -> str | None:
    """Why the native product cannot serve a request, or None."""
    return loader.refuse(request, differentiable=False)


def packed_weight(codes: Tensor, scales: Tensor, columns: int) -> Weight:
    """Describe a packed matrix for the native kernels, in place: the tensors must outlive the result.

    Raises:
        ValueError: no packed matrix of that width, or not contiguous, or not on the CPU.
    """
    group = check_packed(codes, scales, columns)
    if codes.device.type != "cpu" or not (codes.is_contiguous() and scales.is_contiguous()):
        raise ValueError("a packed matrix must be contiguous and on the CPU for the native kernels")
    kind = INT4 if group else INT8
    return Weight(kind, group, codes.shape[0], columns, codes.data_ptr(), scales.data_ptr())


def linear(x: Tensor, codes: Tensor, scales: Tensor, activation_bits: int) -> Tensor:
    """(..., in) -> (..., out) in the dtype of ``x``; arguments as for ``quantized_linear``."""
    return _linear(x, codes, scales, activation_bits)


@torch.library.custom_op("openxlstm::quantized_linear_native", mutates_args=())
def _linear(x: Tensor, codes: Tensor, scales: Tensor, activation_bits: int) -> Tensor:
    columns = x.shape[-1]
    inputs = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    y = inputs.new_empty((*x.shape[:-1], codes.shape[0]))
    if y.numel():
        weight = packed_weight(codes, scales, columns)
        batch, limit = inputs.numel() // columns, limit_of(activation_bits)
        bfloat16 = inputs.dtype == torch.bfloat16
        a = _Arguments(weight, inputs.data_ptr(), y.data_ptr(), batch, limit, bfloat16)
        loader.call("oxl_quantized_product", a)
    return y.to(x.dtype)


@_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, activation_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
