"""What quantisation costs: perplexity on held-out text for every scheme, against the same model in bfloat16.

Train the model first (about two minutes on two cores), then run this (about five):

    openxlstm demo --output runs/demo
    python benchmarks/quantization_perplexity.py --run runs/demo

The held-out documents were split off before anything was trained. Scales by importance are calibrated on the
first 32,768 tokens of the training text. "bfloat16" are the float32 weights of the run, rounded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RESULTS, environment
from openxlstm import load_pretrained
from openxlstm.checkpoint.quantization import CALIBRATION_TOKENS, input_moments
from openxlstm.layers.quantized import Quantization, quantize_model

ROW = 1024


def tokens_of(run: Path, split: str, count: int | None = None) -> Tensor:
    """Token ids of a split of the run's data, documents one after the other."""
    data = run / "data"
    dtype = json.loads((data / "manifest.json").read_text()).get("dtype", "uint16")
    files = sorted(data.glob(f"{split}-*.tokens.bin"))
    if not files:
        raise SystemExit(f"no {split} tokens in {data}: give the directory that `openxlstm demo` wrote")
    numbers = np.concatenate([np.fromfile(f, dtype=dtype) for f in files])
    return torch.from_numpy(numbers[:count].astype(np.int64))


@torch.inference_mode()
def loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean negative log-likelihood in nats, the model starting anew every 1,024 tokens."""
    rows = (len(tokens) - 1) // ROW
    inputs, targets = tokens[: rows * ROW].view(rows, ROW), tokens[1 : rows * ROW + 1].view(rows, ROW)
    total = 0.0
    for x, y in zip(inputs.split(4), targets.split(4), strict=True):
        logits = model(x).float().flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, y.flatten(), reduction="sum"))
    return total / (rows * ROW)


def schemes() -> dict[str, Quantization]:
    """Every scheme by the name of its row."""
    rows = {"int8": Quantization(), "int8, activations 8 bits": Quantization(activation_bits=8)}
    for group in (32, 64):
        for method in ("plain", "error-aware", "importance"):
            rows[f"int4 group {group}, {method}"] = Quantization(4, group, method)
    rows["int4 group 32, error-aware, head 8 bits"] = Quantization(4, 32, head_bits=8)
    rows["int4 group 32, error-aware, head not quantised"] = Quantization(4, 32, head_bits=16)
    rows["int4 group 32, error-aware, activations 8 bits"] = Quantization(4, 32, activation_bits=8)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="directory that `openxlstm demo` wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.allocator = "default"
    torch.set_num_threads(arguments.threads)
    held_out = tokens_of(arguments.run, "validation")
    calibration = tokens_of(arguments.run, "train", CALIBRATION_TOKENS)

    def fresh() -> Any:
        return load_pretrained(arguments.run / "model")[0].float()

    model = fresh()
    moments = input_moments(model, Quantization(), calibration)
    report: dict[str, Any] = {"name": "quantization-perplexity", **environment(arguments)}
    report |= {"held_out_tokens": len(held_out), "float32_nats_per_token": loss(model, held_out), "rows": {}}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = loss(model, held_out)
    report["bfloat16_nats_per_token"] = reference
    print(f"bfloat16: perplexity {math.exp(reference):.3f} per token of {len(held_out):,} held out")
    print(f"{'float32':48s} {math.exp(report['float32_nats_per_token'] - reference) - 1:+8.3%}")
    for name, quantization in schemes().items():
        nats = loss(quantize_model(fresh(), quantization, moments), held_out)
        change = math.exp(nats - reference) - 1
        report["rows"][name] = {"nats_per_token": nats, "perplexity_change": change}
        print(f"{name:48s} {change:+8.3%}", flush=True)
    today = datetime.date.today().isoformat()
    output = arguments.output or RESULTS / f"{today}-quantization-perplexity.json"
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
