"""Backend ``native`` of :func:`openxlstm.ops.matmul.matmul`: float32, in C++, on CPUs.

Each number is summed in one order, whatever the number of threads and the size of the matrices, so a row's
result does not depend on the other rows, bit for bit. Differentiable any number of times.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openxlstm.ops.dispatch import Request
from openxlstm.ops.native import loader
from openxlstm.ops.native.operands import Operands
from openxlstm.runtime import cpu_info

LEAST_ROWS = 64
"""With fewer, putting the other matrix in order costs more than the product gains."""


class _Arguments(ctypes.Structure):
    """``MatrixProduct`` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "bias", "c")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "a_m", "a_k", "b_k", "b_n")),
        *((name, ctypes.c_int64) for name in ("rows_per_task", "columns_per_task", "scratch")),
    )


def refuse(request: Request) -> str | None:
    """Why the native product cannot serve a request, or None."""
    if request.dtype in (torch.float16, torch.bfloat16):
        return f"computes in float32, not {str(request.dtype).removeprefix('torch.')}"
    return loader.refuse(request, differentiable=True)


def automatic(request: Request) -> bool:
    """Whether it is faster than PyTorch's product, by measurement (benchmarks/matmul_cpu.py)."""
    few = request.options.get("rows", LEAST_ROWS) < LEAST_ROWS
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        few = statically_known_true(few)  # a graph for any number of rows stays one for any number
    return not few and _pytorch_leaves_units_idle()


def _pytorch_leaves_units_idle() -> bool:
    """PyTorch multiplies float32 by MKL, which uses 512-bit vectors on processors of its maker only."""
    isa = loader.status().isa
    return isa is not None and isa.startswith("avx512") and not _is_intel()


# as loader.unavailable(): a compiled graph keeps the answer
setattr(_pytorch_leaves_units_idle, "_dynamo_marked_constant", True)  # noqa: B010


def _is_intel() -> bool:
    """Also where it is not known to be another's."""
    return cpu_info("vendor_id") in ("GenuineIntel", None)


@torch.library.custom_op("openxlstm::matmul", mutates_args=())
def native(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` for float32 matrices (M, K), (K, N) and a vector (N)."""
    c = a.new_empty(a.shape[0], b.shape[1])
    if not a.shape[1]:
        return c.zero_() if bias is None else c.copy_(bias)
    if c.numel():
        operands = Operands()
        a, b = (operands.hold(x if 1 in x.stride() else x.contiguous()) for x in (a, b))
        addresses = (a.data_ptr(), b.data_ptr(), operands.keep(bias), c.data_ptr())
        sizes = (*c.shape, a.shape[1], *a.stride(), *b.stride())
        loader.call("oxl_matrix_product", _Arguments(*addresses, *sizes))
    return c


@native.register_fake
def _(a, b, bias):
    return a.new_empty(a.shape[0], b.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _autograd(ctx, dc):
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    da = native(dc, b.t(), None) if wanted[0] else None
    db = native(a.t(), dc, None) if wanted[1] else None
    return da, db, dc.sum(0) if ctx.has_bias else None


native.register_autograd(_autograd, setup_context=_setup_context)
