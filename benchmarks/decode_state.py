"""What keeping the mLSTM's memories in bfloat16 costs while decoding: float32 and bfloat16 side by side.

    python benchmarks/decode_state.py --model runs/demo/model --text notes.txt
    python benchmarks/decode_state.py --random 2

Both engines read the same tokens, of a text or random ones. Printed per thousand tokens: the mean relative
error of the logits, how often the most likely token is another one, and, on a text, the loss (nats) of both.
Errors that grew with the context would show from line to line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import openxlstm
from openxlstm.inference.engine import DecodeEngine
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--text", type=Path, help="text to read; random tokens unless given")
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="also N models with random weights"
    )
    parser.add_argument("--tokens", type=int, default=10_000)
    options = parser.parse_args()
    if options.model is None and not options.random:
        parser.error("nothing to study: give --model or --random")
    if options.text is not None and options.model is None:
        parser.error("--text is for a --model: random models have no tokenizer")
    if options.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {options.tokens}")
    if options.model is not None:
        model, tokenizer = openxlstm.load_pretrained(options.model)
        tokens = None
        if options.text is not None:
            if tokenizer is None:
                parser.error(f"{options.model} has no tokenizer to read --text with")
            tokens = tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
        study(str(options.model), model, tokens, options.tokens)
    for seed in range(options.random):
        torch.manual_seed(seed)
        config = xLSTMLargeConfig(embedding_dim=128, num_heads=2, num_blocks=4, vocab_size=512)
        study(f"random weights, seed {seed}", xLSTMLarge(config), None, options.tokens)


def study(name: str, model: torch.nn.Module, text: list[int] | None, count: int) -> None:
    """Print the differences for one model."""
    exact, rounded = DecodeEngine(model), DecodeEngine(model, state_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tokens = text or torch.randint(exact.vocab_size, (count,), generator=generator).tolist()
    print(f"{name}: {len(tokens)} tokens {'of the text' if text else 'at random'}")
    high, low = exact.open(), rounded.open()
    rows = []
    for position, token in enumerate(tokens):
        a, high = exact.step([token], high, reuse=True)
        b, low = rounded.step([token], low, reuse=True)
        row = [float((b - a).norm() / a.norm()), float(a.argmax() != b.argmax()), 0.0, 0.0]
        if text and position + 1 < len(tokens):
            row[2:] = [-float(x.log_softmax(-1)[0, tokens[position + 1]]) for x in (a, b)]
        rows.append(row)
        if len(rows) == 1000 or position + 1 == len(tokens):
            error, other, *losses = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
            line = f"  to {position + 1:6d}: error {error:.2e}, other token {100 * other:.2f} %"
            print(line + (f", loss {losses[0]:.5f} and {losses[1]:.5f}" if text else ""), flush=True)
            rows = []


if __name__ == "__main__":
    main()
