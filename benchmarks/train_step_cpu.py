"""A training step of the 160M `xLSTMLarge` on a CPU against the published models.

    python benchmarks/train_step_cpu.py --dtype float32
    python benchmarks/train_step_cpu.py --dtype bfloat16 --repeats 3        # bfloat16 autocast

Embedding 768, 12 blocks, 4 heads, vocabulary 50,304; forward, cross-entropy, backward. The peers are the
`xlstm` package's `xLSTMLarge` (its training mode fails unless last states are returned, so they are) and the
`transformers` copy, both with their fastest kernel that runs without a GPU. On a CPU without bfloat16 units
bfloat16 products are emulated, a hundred times slower: there `--batch`, `--length` and `--blocks` make a run
possible at all.
"""

from __future__ import annotations

import torch

from harness import Variant, parser, run, with_allocator

VOCAB = 50304


def step_call(model: torch.nn.Module, loss, batch: int, length: int, autocast: bool):
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (batch, length + 1))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = loss(model, tokens[:, :-1], tokens[:, 1:])
        (total / (batch * length)).backward()
        model.zero_grad(set_to_none=True)

    return call


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--blocks", type=int, default=12)
    arguments = p.parse_args()
    with_allocator(arguments)
    autocast = arguments.dtype == "bfloat16"
    size = (arguments.batch, arguments.length, autocast)
    shape = {"embedding_dim": 768, "num_heads": 4, "num_blocks": arguments.blocks, "vocab_size": VOCAB}

    def ours():
        from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

        return step_call(xLSTMLarge(xLSTMLargeConfig(**shape)), lambda m, x, y: m.summed_loss(x, y), *size)

    def reference():
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

        config = xLSTMLargeConfig(
            **shape,
            return_last_states=True,
            mode="train",
            chunkwise_kernel="chunkwise--native_custbw",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
        )
        return step_call(xLSTMLarge(config), lambda m, x, y: summed_loss(m(x)[0], y), *size)

    def huggingface():
        from transformers import xLSTMConfig, xLSTMForCausalLM

        config = xLSTMConfig(
            hidden_size=768,
            num_hidden_layers=arguments.blocks,
            num_heads=4,
            vocab_size=VOCAB,
            chunkwise_kernel="chunkwise--native_autograd",
            mode="train",
        )
        model = xLSTMForCausalLM(config).train()
        return step_call(model, lambda m, x, y: summed_loss(m(x, use_cache=False).logits, y), *size)

    variants = [
        Variant("openxlstm xLSTMLarge", ours),
        Variant("xlstm xLSTMLarge", reference),
        Variant("transformers xLSTMForCausalLM", huggingface),
    ]
    label = (
        f"training step, 768 x {arguments.blocks}, batch {arguments.batch}, length {arguments.length}, "
        f"{'bfloat16 autocast' if autocast else 'float32'}"
    )
    run(f"train-step-{arguments.dtype}", {label: variants}, arguments, peer="xlstm", ours="openxlstm")


if __name__ == "__main__":
    main()
