"""Products of a weight matrix with a few vectors on CPUs: what decoding consists of.

Every weight is read once from memory and meets all vectors while it is in registers or cache. The sums run in
one order that the matrix alone decides, so a vector's result depends neither on the others nor on the number
of threads, bit for bit. Products and sums are float32, whatever the weights are stored as.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.native import loader

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class Weight(ctypes.Structure):
    """``Weight`` of native/kernels.h. Holds addresses only: the tensors must outlive it."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class _Arguments(ctypes.Structure):
    """``Product`` of native/kernels.h."""

    _fields_ = (
        ("weight", Weight),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "x_stride", "y_stride", "rows_per_task")),
    )


class _Probe(ctypes.Structure):
    """``Probe`` of native/kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("each", ctypes.c_int64),
        ("seen", ctypes.c_void_p),
    )


class _Span(ctypes.Structure):
    """``Span`` of native/kernels.h."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


def use_huge_pages(x: Tensor) -> None:
    """Move ``x`` into huge pages of memory where the system has them: it is read faster from there."""
    if loader.unavailable() is None:
        loader.call("oxl_huge_pages", _Span(x.data_ptr(), x.nbytes))


def read_memory(x: Tensor) -> None:
    """Read ``x``, contiguous float32, from memory as fast as it comes: the bound of decoding.

    Runs on the threads of the native kernels. Those of PyTorch keep spinning for a while after such a call
    and would disturb what is measured next; they serve where there are no native kernels.
    """
    if loader.unavailable() is not None:
        x.sum()
        return
    loader.call("oxl_probe", _Probe(x.data_ptr(), x.numel(), 0, None))


def dense_weight(weight: Tensor) -> Weight:
    """Describe a matrix (out, in) for the native kernels, in place.

    Raises:
        ValueError: not a contiguous float32 or bfloat16 matrix on the CPU.
    """
    if weight.ndim != 2 or weight.dtype not in _KINDS or weight.device.type != "cpu":
        raise ValueError(
            f"the weight must be a float32 or bfloat16 matrix (out, in) on the CPU, got {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device.type}"
        )
    if not weight.is_contiguous():
        raise ValueError("the weight must be contiguous; call .contiguous() and keep the result")
    return Weight(_KINDS[weight.dtype], 0, *weight.shape, weight.data_ptr(), None)


def multiply(weight: Weight, x: Tensor) -> Tensor:
    """``x @ weight.T`` in float32; the native library must be available.

    Args:
        weight: (out, in), from :func:`dense_weight`.
        x: (B, in).

    Returns:
        (B, out), float32.

    Raises:
        ValueError: ``x`` is not (B, in).
    """
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"x must be (batch, {weight.columns}), got {tuple(x.shape)}")
    x = x.float().contiguous()
    y = torch.empty(x.shape[0], weight.rows)
    if y.numel():
        a = _Arguments(weight, x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], weight.rows, 0)
        loader.call("oxl_product", a)
    return y
