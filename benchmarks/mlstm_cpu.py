"""The mLSTM operator on a CPU: forward and backward against the published chunkwise kernels.

    python benchmarks/mlstm_cpu.py --dtype float32
    python benchmarks/mlstm_cpu.py --dtype bfloat16 --repeats 3

The peer is `mlstm_kernels` from PyPI: its custom-backward chunkwise kernel at its default chunk of 64 and at
128. That backward leaves out the normaliser's gradient; ours is exact. Rates count useful operations only,
those of `least_mlstm_flops`, whatever an implementation really computes.
"""

from __future__ import annotations

import torch

from harness import Variant, parser, run, with_allocator

SHAPES = {"7B-like": (1, 2048, 8, 256, 512), "1.3B-like": (4, 2048, 8, 128, 256)}


def flops(batch: int, time: int, heads: int, qk_dim: int, v_dim: int) -> float:
    """Least work of forward and backward, counting only the causal half of a chunk's tiles."""
    from openxlstm.models.accounting import least_mlstm_flops

    return batch * least_mlstm_flops(time, heads, qk_dim, v_dim)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, head_first: bool) -> list[torch.Tensor]:
    batch, time, heads, qk_dim, v_dim = shape
    torch.manual_seed(0)
    x = [torch.randn(batch, time, heads, d) for d in (qk_dim, qk_dim, v_dim)]
    x += [torch.randn(batch, time, heads), torch.randn(batch, time, heads) + 3.0, torch.randn_like(x[2])]
    x = [t.to(dtype) for t in x]
    if head_first:
        x = [t.transpose(1, 2).contiguous() for t in x]
    return [t.requires_grad_() for t in x[:5]] + [x[5]]


def train_call(function, tensors: list[torch.Tensor]):
    *x, grad = tensors

    def call() -> None:
        function(*x).backward(grad)
        for t in x:
            t.grad = None

    return call


def variant_ours(shape: tuple[int, ...], dtype: torch.dtype) -> Variant:
    def prepare():
        from openxlstm.ops import mlstm

        return train_call(mlstm, inputs(shape, dtype, head_first=False))

    return Variant("openxlstm", prepare, flops(*shape))


def variant_peer(shape: tuple[int, ...], dtype: torch.dtype, chunk: int) -> Variant:
    def prepare():
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel("chunkwise--native_custbw")
        return train_call(lambda *x: kernel(*x, chunk_size=chunk), inputs(shape, dtype, head_first=True))

    return Variant(f"mlstm_kernels native_custbw L={chunk}", prepare, flops(*shape))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--shape", choices=(*SHAPES, "all"), default="all")
    arguments = p.parse_args()
    with_allocator(arguments)
    dtype = getattr(torch, arguments.dtype)
    chunks = (64, 128) if dtype == torch.float32 else (64,)
    groups = {}
    for label, shape in SHAPES.items():
        if arguments.shape in (label, "all"):
            peers = [variant_peer(shape, dtype, chunk) for chunk in chunks]
            groups[f"{label} {shape} {arguments.dtype}"] = [variant_ours(shape, dtype), *peers]
    run(f"mlstm-{arguments.dtype}", groups, arguments, peer="mlstm_kernels", ours="openxlstm", dtype=dtype)


if __name__ == "__main__":
    main()
