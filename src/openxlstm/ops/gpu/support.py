"""Whether Triton kernels can run here, and the type rules they share.

Triton is an optional package. It is looked for without importing it and imported by the kernel modules alone,
when a kernel first runs. On a machine without a GPU the kernels run in Triton's interpreter, slowly and for
tests only: start Python with ``TRITON_INTERPRET=1`` and ask for the backend by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from openxlstm.ops.dispatch import Request

MINIMUM = (3, 6)
"""Oldest Triton release the kernels are tested with."""

MAX_HEAD_DIM = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _installed() -> tuple[int, ...] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


VERSION = _installed()
"""Version of the installed Triton (found without importing it), or None."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on CPU tensors)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse(request: Request) -> str | None:
    """Why Triton kernels cannot serve a request, or None."""
    if VERSION is None:
        return "Triton is not installed (pip install 'openxlstm[gpu]')"
    if VERSION < MINIMUM:
        have, need = (".".join(map(str, v)) for v in (VERSION, MINIMUM))
        return f"Triton {have} is too old, install {need} or newer"
    if request.device.type == "cpu" and not interpreted():
        return "runs on CUDA and ROCm devices; on a CPU only for tests, with TRITON_INTERPRET=1"
    if request.device.type not in ("cuda", "cpu"):
        return f"runs on CUDA and ROCm devices, not on {request.device.type}"
    if request.dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
    head_dim = request.options.get("head_dim", 1)
    if head_dim > MAX_HEAD_DIM:
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def automatic(request: Request) -> bool:
    """Whether ``"auto"`` may choose Triton: on GPUs, never the interpreter."""
    return request.device.type == "cuda"


def precision(dtype: torch.dtype) -> str:
    """How matrix products treat float32 operands, from :func:`torch.get_float32_matmul_precision`.

    ``highest`` is IEEE float32, ``high`` three TF32 products (about float32), ``medium`` one TF32 product.
    float16 inputs use TF32 where a product could leave the range of float16. On AMD devices, which have no
    TF32 instructions of this kind, it is IEEE float32.
    """
    if torch.version.hip is not None:
        return "ieee"
    if dtype != torch.float32:
        return "tf32"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def carried_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which states between chunks are stored and multiplied: it must have the range of float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def kernel(module: str, name: str) -> Any:
    """A kernel of ``openxlstm.ops.<module>``; importing that module imports Triton."""
    return getattr(importlib.import_module(f"openxlstm.ops.{module}"), name)


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension is contiguous, as kernels need; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
