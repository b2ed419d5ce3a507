"""``openxlstm convert``: checkpoints between the published layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openxlstm.checkpoint import convert
from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm convert runs/large/model out --to huggingface             (for transformers)
  openxlstm convert NX-AI/xLSTM-7b out --to reference --weight-mode fused --dtype bfloat16
  openxlstm convert old/stack.safetensors out --to openxlstm"""


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a checkpoint, tensor by tensor, without ever holding the whole model.

    The source may be anything that load_pretrained reads. The numbers stay the same, bit for bit, unless
    --dtype is given.
    """

    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    """Checkpoint directory, weight file, or hub id."""
    target: Annotated[Path, Positional, arg(metavar="TARGET")]
    """Directory to write."""
    to: Literal["huggingface", "reference", "openxlstm"] = "openxlstm"
    """huggingface: what transformers loads; reference: the published package's; openxlstm: ours."""
    weight_mode: Literal["single", "fused"] = "single"
    """fused joins the linear maps of an xLSTMLarge that share an input (reference layout only)."""
    slstm_layout: Literal["vanilla", "cuda"] = "vanilla"
    """Which published backend's layout sLSTM cells are written in (reference layout only)."""
    dtype: str | None = None
    """Numeric type to convert to: float32, bfloat16, float16."""
    max_shard_gb: float = 4.0
    """Gigabytes at which the weights are cut into several files."""
    overwrite: bool = False
    """Replace the checkpoint in TARGET; its other files are left alone."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(ConvertOptions, arguments, command="convert", examples=EXAMPLES)
    target = options.target
    check_target(target, options.overwrite)
    before = _files(target)
    convert(
        options.source,
        target,
        to=options.to,
        weight_mode=options.weight_mode,
        slstm_layout=options.slstm_layout,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_gb * 1e9,
    )
    written = sorted(name for name, _ in _files(target) - before)
    print(f"wrote {target}: {', '.join(written)}")
    return 0


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to write into a directory of other files, or over a checkpoint unless told to.

    Raises:
        ValueError: as said.
    """
    if target.is_dir() and any(target.iterdir()):
        if not any(target.glob("model*.safetensors")):
            raise ValueError(f"'{target}' holds other files and no checkpoint; choose a new directory")
        if not overwrite:
            raise ValueError(f"'{target}' holds a checkpoint; choose a new directory, or give --overwrite")


def _files(directory: Path) -> set[tuple[str, int]]:
    """Name and identity of the files in ``directory``; one that was replaced has another identity."""
    if not directory.is_dir():
        return set()
    return {(path.name, path.stat().st_ino) for path in directory.iterdir() if path.is_file()}
