"""Whether Triton kernels can run here, and the type rules they share.

Triton is an optional package. It is looked for without importing it and imported by the kernel modules alone,
when a kernel first runs. On a machine without a GPU the kernels run in Triton's interpreter, slowly and for
tests only: start Python with ``TRITON_INTERPRET=1`` and ask for the backend by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openxlstm.ops.dispatch import Request

MINIMUM = (3, 6)
"""Oldest Triton release the kernels are tested with."""

MINIMUM_CAPABILITY = (8, 0)
"""Oldest NVIDIA generation: Ampere, the first with bfloat16 and asynchronous copies."""

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
    capability = _capability(request.device)
    if capability is not None and capability < MINIMUM_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, MINIMUM_CAPABILITY))
        return f"needs an NVIDIA GPU of compute capability {need} or newer, this one has {have}"
    if request.dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
    head_dim = request.options.get("head_dim", 1)
    if head_dim > MAX_HEAD_DIM:
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA device that is here, else None; None while a graph is traced."""
    if torch.compiler.is_compiling() or device.type != "cuda" or torch.version.hip is not None:
        return None
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


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


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: ``kernel[grid](*arguments, **options)`` launches it on its tensors' device, whichever
    device is the current one, on the current stream of that device."""

    function: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
            with torch.cuda.device_of(tensor):  # nothing on a CPU
                self.function[grid](*arguments, **options)

        return launch


@functools.cache
def kernel(module: str, name: str) -> Kernel:
    """A kernel of ``openxlstm.ops.<module>``; importing that module imports Triton."""
    return Kernel(getattr(importlib.import_module(f"openxlstm.ops.{module}"), name))


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if kernels can walk through it: its last dimension is contiguous and 1,024 steps along the
    second, the most that kernels take within a chunk, stay below 2**31 elements. Else a copy."""
    fits = x.ndim < 2 or x.stride(1) < 2**21
    return x if fits and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()
