"""Writing checkpoints: streamed safetensors shards, and directories that appear whole or not at all.

``write_directory`` puts everything into a temporary directory first. A new checkpoint is renamed into place
in one step; over an existing one the files are moved in one by one, the configuration last, so that a
directory that has its ``config.json`` is complete. Files that do not belong to a checkpoint are left alone.
When anything fails, a full disk above all, the temporary directory is removed and the old checkpoint stands.

Tensors are written one at a time, so memory holds one of them, however large the checkpoint. The safetensors
header is padded so that large tensors start at multiples of 64 bytes in memory maps.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from openxlstm.checkpoint.weights import INDEX_NAME, SAFETENSORS_DTYPES, Weights
from openxlstm.runtime import sync_directory

DEFAULT_SHARD_BYTES = 5_000_000_000
"""Size at which weights are cut into several files, the limit that the Hugging Face libraries use."""
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_WEIGHT_FILE = re.compile(r"model(_\d+|-\d+-of-\d+)?\.safetensors")


def plan_shards(
    weights: Weights, max_shard_bytes: float, style: str
) -> tuple[dict[str, Weights], str | None]:
    """Distribute tensors over files, in order.

    Args:
        weights: what to write.
        max_shard_bytes: a file gets no further tensor that would take it beyond this.
        style: ``"huggingface"`` (``model-00001-of-00006.safetensors`` with an index) or ``"reference"``
            (``model_0.safetensors``, ...). One file is ``model.safetensors`` in both.

    Returns:
        the files' content by name, and the text of the index if there is one.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[Weights] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}, None
    if style == "reference":
        return {f"model_{n}.safetensors": shard for n, shard in enumerate(shards)}, None
    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": s for n, s in enumerate(shards, start=1)}
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    return files, json.dumps(index, indent=2) + "\n"


def write_safetensors(path: Path, weights: Weights) -> None:
    """Write one safetensors file, reading one tensor at a time."""
    # in the order given, but what would push others off their alignment last
    ragged = {name: tensor.nbytes % 64 != 0 for name, tensor in weights.items()}
    ordered = sorted(weights.items(), key=lambda item: ragged[item[0]] and 9 - item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, tensor in ordered:
            data = tensor.load().detach().to("cpu").contiguous()
            if tuple(data.shape) != tensor.shape or data.dtype != tensor.dtype:
                raise RuntimeError(f"tensor '{name}' changed while it was written")
            stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def write_directory(directory: Path, texts: Mapping[str, str], shards: Mapping[str, Weights]) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        directory: target; made if missing, with its parents.
        texts: content of the text files by name.
        shards: tensors of the weight files by name.

    Raises:
        ValueError: ``directory`` is a file.
        OSError: it could not be written, such as a full disk; nothing is left half-written.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save a checkpoint to '{directory}': it is a file, not a directory")
    replacing = directory.is_dir()
    name = f".{directory.name}.{os.getpid()}.tmp"
    temporary = directory / name if replacing else directory.parent / name
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _require_space(temporary.parent, sum(t.nbytes for s in shards.values() for t in s.values()))
        temporary.mkdir()
        for file, weights in shards.items():
            write_safetensors(temporary / file, weights)
        for file, text in texts.items():
            with (temporary / file).open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        sync_directory(temporary)
        if replacing:
            _move_into(temporary, directory, [*shards, *texts])
        else:
            os.replace(temporary, directory)
            sync_directory(directory.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"cannot save the checkpoint '{directory}': {reason}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        reason = f"it needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left"
        raise OSError(errno.ENOSPC, reason)


def _move_into(temporary: Path, directory: Path, names: list[str]) -> None:
    """Replace the checkpoint in ``directory`` by the files in ``temporary``; the configuration comes last."""
    for config in ("config.json", "config.yaml"):
        (directory / config).unlink(missing_ok=True)
    for path in directory.iterdir():
        stale = _WEIGHT_FILE.fullmatch(path.name) or path.name == INDEX_NAME
        if stale and path.name not in names:
            path.unlink()
    for name in sorted(names, key=lambda n: n.startswith("config.")):
        os.replace(temporary / name, directory / name)
    sync_directory(directory)
