"""The sLSTM and LSTM cells on a CPU: forward and backward against the published cell and PyTorch's LSTM.

    python benchmarks/slstm_cpu.py
    python benchmarks/slstm_cpu.py --cell lstm --shape large

float32. The peer of the sLSTM is the `xlstm` package's cell with `backend="vanilla"`, the only one that runs
without a GPU; it needs some 20 GB at the shape `large`, so `wide` has a quarter of its steps. The peer of the
LSTM is `torch.nn.LSTM` of the same hidden size: its recurrent matrix is dense (heads times as many numbers),
and it multiplies its inputs, of the same width, by a matrix. So does the row of ours that it is compared
with; "recurrence alone" shows ours without. Ours are the portable `scan` and the compiled `native`.
"""

from __future__ import annotations

import torch

from harness import Variant, parser, run, with_allocator
from openxlstm.ops.rnn.api import CellName

SHAPES = {"small": (8, 512, 4, 64), "wide": (16, 256, 4, 256), "large": (16, 1024, 4, 256)}
Shape = tuple[int, int, int, int]


def ours(cell: CellName, backend: str, shape: Shape, *, project: bool = False) -> Variant:
    batch, time, heads, head_dim = shape
    width = heads * head_dim

    def prepare():
        from openxlstm.ops import linear, rnn

        torch.manual_seed(0)
        x = torch.randn(batch, time, 4, heads, head_dim, requires_grad=True)
        weight = (torch.randn(4, heads, head_dim, head_dim) * 0.05).requires_grad_()
        bias = torch.zeros(4, heads, head_dim, requires_grad=True)
        grad = torch.randn(batch, time, heads, head_dim)
        inputs = torch.randn(batch, time, width, requires_grad=True)
        matrix = (torch.randn(4 * width, width) * width**-0.5).requires_grad_()

        def call() -> None:
            gates = linear(inputs, matrix).view(batch, time, 4, heads, head_dim) if project else x
            rnn(cell, gates, weight, bias, backend=backend).backward(grad)
            x.grad = weight.grad = bias.grad = inputs.grad = matrix.grad = None

        return call

    if cell == "lstm" and not project:
        return Variant("recurrence alone (openxlstm)", prepare)
    return Variant(f"openxlstm {backend}", prepare)


def vanilla(shape: Shape) -> Variant:
    batch, time, heads, head_dim = shape

    def prepare():
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        torch.manual_seed(0)
        config = sLSTMCellConfig(
            hidden_size=heads * head_dim,
            num_heads=heads,
            backend="vanilla",
            dtype="float32",
            enable_automatic_mixed_precision=False,
        )
        cell = sLSTMCell(config)
        x = torch.randn(batch, time, 4 * heads * head_dim, requires_grad=True)
        grad = torch.randn(batch, heads, time, head_dim)

        def call() -> None:
            y, _ = cell(x)
            y.backward(grad)
            x.grad = None
            cell.zero_grad()

        return call

    return Variant("xlstm vanilla", prepare)


def dense_lstm(shape: Shape) -> Variant:
    batch, time, heads, head_dim = shape
    width = heads * head_dim

    def prepare():
        torch.manual_seed(0)
        lstm = torch.nn.LSTM(width, width, batch_first=True)
        x, grad = torch.randn(batch, time, width, requires_grad=True), torch.randn(batch, time, width)

        def call() -> None:
            lstm(x)[0].backward(grad)
            x.grad = None
            lstm.zero_grad()

        return call

    return Variant("torch.nn.LSTM", prepare)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--cell", choices=("slstm", "lstm"), default="slstm")
    p.add_argument("--shape", choices=SHAPES, default="small")
    arguments = p.parse_args()
    with_allocator(arguments)
    cell, shape = arguments.cell, SHAPES[arguments.shape]
    label = "{} forward+backward, batch {}, {} steps, {} heads of {}".format(
        "sLSTM" if cell == "slstm" else "LSTM", *shape
    )
    if cell == "slstm":
        variants = [ours(cell, "scan", shape), ours(cell, "native", shape), dense_lstm(shape)]
        if arguments.shape != "large":
            variants.append(vanilla(shape))
    else:
        variants = [ours(cell, "native", shape, project=True), ours(cell, "native", shape), dense_lstm(shape)]
    name = cell if arguments.shape == "small" else f"{cell}-{arguments.shape}"
    peer = "xlstm" if cell == "slstm" and arguments.shape != "large" else "torch"
    run(name, {label: variants}, arguments, peer=peer, ours="openxlstm")


if __name__ == "__main__":
    main()
