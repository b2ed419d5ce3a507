"""float32 products of large matrices on a CPU: the native backend against PyTorch's.

    python benchmarks/matmul_cpu.py

The shapes are those of a training step: 2,048 tokens of a model 768 wide, and the three products of a linear
map (the result, the gradient of the input, the gradient of the weight).
"""

from __future__ import annotations

from functools import partial

import torch

from harness import Variant, parser, run, with_allocator
from openxlstm.ops.matmul import matmul

TOKENS = 2048
SIZES = {"768 to 2,048": (768, 2048), "2,048 to 768": (2048, 768), "768 to 50,304": (768, 50304)}


def operands(part: str, inner: int, outer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of one product of ``y = x weight.T``, laid out as training finds them."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(TOKENS, inner), torch.randn(outer, inner), torch.randn(TOKENS, outer)
    return {"result": (x, weight.t()), "of the input": (dy, weight), "of the weight": (dy.t(), x)}[part]


def variant(name: str, backend: str, part: str, inner: int, outer: int) -> Variant:
    def prepare():
        return partial(matmul, *operands(part, inner, outer), backend=backend)

    return Variant(name, prepare, 2 * TOKENS * inner * outer)


def main() -> None:
    p = parser(__doc__)
    arguments = p.parse_args()
    with_allocator(arguments)
    groups = {}
    for label, (inner, outer) in SIZES.items():
        for part in ("result", "of the input", "of the weight"):
            what = part if part == "result" else f"gradient {part}"
            groups[f"{label}: {what}"] = [
                variant("openxlstm native", "native", part, inner, outer),
                variant("torch", "portable", part, inner, outer),
            ]
    run("matmul", groups, arguments, peer="torch", ours="openxlstm")


if __name__ == "__main__":
    main()
