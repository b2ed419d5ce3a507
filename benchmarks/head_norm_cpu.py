"""Norms and gates of the 160M xLSTMLarge on a CPU: one native pass against PyTorch's operations.

    python benchmarks/head_norm_cpu.py
    python benchmarks/head_norm_cpu.py --dtype float32

Forward and backward at batch 4, length 512: the norm of 4 heads of 192 with the output gate (bfloat16
activations and float32 weights, as under autocast), and the RMSNorm of the residual stream (float32).
"""

from __future__ import annotations

import torch

from harness import Variant, parser, run, with_allocator

BATCH, TIME, HEADS, HEAD_DIM = 4, 512, 4, 192


def variant(name: str, backend: str, dtype: torch.dtype, *, gated: bool) -> Variant:
    """A norm with a gate, or an RMSNorm."""

    def prepare():
        from openxlstm.ops import head_norm

        width = HEADS * HEAD_DIM
        shape = (BATCH, TIME, HEADS, HEAD_DIM) if gated else (BATCH, TIME, 1, width)
        x = torch.randn(shape).to(dtype).requires_grad_()
        gate = torch.randn(BATCH, TIME, width).to(dtype).requires_grad_() if gated else None
        weight = torch.ones(width, requires_grad=True)
        grad = torch.randn(BATCH, TIME, width)

        def call() -> None:
            head_norm(x, weight, gate=gate, center=gated, backend=backend).backward(grad)
            for tensor in (x, weight, gate):
                if tensor is not None:
                    tensor.grad = None

        return call

    return Variant(name, prepare)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = p.parse_args()
    with_allocator(arguments)
    dtype = getattr(torch, arguments.dtype)
    names = (("openxlstm native", "native"), ("PyTorch", "portable"))
    shape = f"forward+backward, {BATCH} x {TIME} x {HEADS} x {HEAD_DIM}"
    groups = {
        f"norm of heads and gate, {shape}, {arguments.dtype}": [
            variant(*name, dtype, gated=True) for name in names
        ],
        f"RMSNorm, {shape}, float32": [variant(*name, torch.float32, gated=False) for name in names],
    }
    run(f"head-norm-{arguments.dtype}", groups, arguments, peer="PyTorch", ours="openxlstm")


if __name__ == "__main__":
    main()
