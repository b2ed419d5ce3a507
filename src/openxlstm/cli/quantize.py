"""``openxlstm quantize``: a checkpoint with int8 or int4 weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm quantize runs/demo/model runs/demo/int8
  openxlstm quantize runs/demo/model runs/demo/int4 --bits 4 --group 64
  openxlstm quantize runs/demo/model runs/demo/int4 --bits 4 --method importance --calibration notes.txt
  openxlstm generate runs/demo/int8 "def read("                (use it like any other checkpoint)"""


@dataclass(frozen=True)
class QuantizeOptions:
    """Write a checkpoint whose large matrices are int8 or int4, for fast generation on CPUs.

    The matrices stay packed in memory; load_pretrained maps them from the file. Embedding, gates, norms,
    convolutions and recurrent matrices stay as they are.
    """

    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    """Checkpoint directory, weight file, or hub id."""
    target: Annotated[Path, Positional, arg(metavar="TARGET")]
    """Directory to write."""
    bits: Literal[8, 4] = 8
    """8: a scale per output, a quarter of float32's size. 4: a scale per group of inputs, about a seventh."""
    group: Literal[32, 64] = 32
    """Inputs that share a scale, with --bits 4. 32 is more accurate, 64 is 5 % smaller."""
    method: Literal["plain", "error-aware", "importance"] = "error-aware"
    """How scales are chosen: to reach the largest weight; for the least squared error; for the least error
    weighted by how large inputs are on the text of --calibration."""
    calibration: Path | None = None
    """Text file for --method importance, of the kind the model will see; 32,768 tokens are used."""
    head_bits: Literal[4, 8, 16] | None = None
    """Bits of the vocabulary head; as --bits unless given. 8 with --bits 4 halves the loss of small models;
    16 leaves it as it is."""
    activation_bits: Literal[16, 8] = 16
    """Rounding of activations while prompts are read: 16 is practically exact; 8 is faster on processors
    with byte products (VNNI)."""
    dtype: str | None = None
    """Numeric type of all that is not quantised: float32, bfloat16; as stored unless given."""
    max_shard_gb: float = 4.0
    """Gigabytes at which the weights are cut into several files."""
    overwrite: bool = False
    """Replace the checkpoint in TARGET; its other files are left alone."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(QuantizeOptions, arguments, command="quantize", examples=EXAMPLES)
    if (options.method == "importance") != (options.calibration is not None):
        raise ValueError("--method importance and --calibration TEXT go together; give both or neither")
    if options.calibration is not None and not options.calibration.is_file():
        raise FileNotFoundError(f"calibration text '{options.calibration}' does not exist or is no file")

    from tqdm import tqdm

    from openxlstm.checkpoint import quantize_checkpoint
    from openxlstm.cli.convert import check_target
    from openxlstm.layers.quantized import Quantization

    check_target(options.target, options.overwrite)
    quantization = Quantization(
        bits=options.bits,
        group=options.group,
        method=options.method,
        head_bits=options.head_bits,
        activation_bits=options.activation_bits,
    )
    with tqdm(desc="quantising", unit="matrix", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize_checkpoint(
            options.source,
            options.target,
            quantization,
            calibration=_pieces(options.calibration),
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_gb * 1e9,
            on_matrix=show,
        )
    size = sum(path.stat().st_size for path in options.target.glob("model*.safetensors"))
    print(f"wrote {options.target}: {size / 2**20:,.1f} MiB")
    return 0


def _pieces(path: Path | None) -> Iterator[str]:
    """The text in pieces of about a megabyte, so that a large file is not read whole."""
    if path is None:
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        while lines := stream.readlines(1 << 20):
            yield "".join(lines)
