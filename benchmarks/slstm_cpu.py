"""The sLSTM cell on a CPU: forward and backward against the published `vanilla` cell.

    python benchmarks/slstm_cpu.py

Batch 8, 512 steps, 4 heads of 64, float32. The peer is the `xlstm` package's sLSTM cell with
`backend="vanilla"`, the only one that runs without a GPU; ours are the portable
`scan` and the compiled `native`.
"""

from __future__ import annotations

import torch

from harness import Variant, parser, run, with_allocator

BATCH, TIME, HEADS, HEAD_DIM = 8, 512, 4, 64


def variant_ours(backend: str) -> Variant:
    def prepare():
        from openxlstm.ops import rnn

        torch.manual_seed(0)
        x = torch.randn(BATCH, TIME, 4, HEADS, HEAD_DIM, requires_grad=True)
        weight = (torch.randn(4, HEADS, HEAD_DIM, HEAD_DIM) * 0.05).requires_grad_()
        bias = torch.zeros(4, HEADS, HEAD_DIM, requires_grad=True)
        grad = torch.randn(BATCH, TIME, HEADS, HEAD_DIM)

        def call() -> None:
            rnn("slstm", x, weight, bias, backend=backend).backward(grad)
            x.grad = weight.grad = bias.grad = None

        return call

    return Variant(f"openxlstm {backend}", prepare)


def variant_peer() -> Variant:
    def prepare():
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        torch.manual_seed(0)
        config = sLSTMCellConfig(
            hidden_size=HEADS * HEAD_DIM,
            num_heads=HEADS,
            backend="vanilla",
            dtype="float32",
            enable_automatic_mixed_precision=False,
        )
        cell = sLSTMCell(config)
        x = torch.randn(BATCH, TIME, 4 * HEADS * HEAD_DIM, requires_grad=True)
        grad = torch.randn(BATCH, HEADS, TIME, HEAD_DIM)

        def call() -> None:
            y, _ = cell(x)
            y.backward(grad)
            x.grad = None
            cell.zero_grad()

        return call

    return Variant("xlstm vanilla", prepare)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with_allocator(arguments)
    label = f"sLSTM forward+backward, batch {BATCH}, {TIME} steps, {HEADS} heads of {HEAD_DIM}"
    variants = [variant_ours("scan"), variant_ours("native"), variant_peer()]
    run("slstm", {label: variants}, arguments, peer="xlstm", ours="openxlstm")


if __name__ == "__main__":
    main()
