"""Reading weights: a checkpoint as a mapping from name to lazy tensor.

Nothing is read before it is asked for. Safetensors files are memory-mapped, so a tensor that is used as it
stands costs no memory beyond the page cache, and one that is converted exists once, converted. Pickled files
(``.pt``, ``.pth``, ``.bin``) go through ``torch.load(weights_only=True)``, which cannot run code.

Every defect of a file (missing, truncated, foreign, an incomplete set of shards) is one ``FileNotFoundError``
or ``ValueError`` that names it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openxlstm.config import read_mapping

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that can be described without being read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Reads it; the result may alias a memory-mapped file."""

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """Wrap a tensor that is already in memory."""
        tensor = tensor.detach()
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same in another floating point type; other kinds and ``None`` leave it as it is."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))

    def map(self, shape: Iterable[int], function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """``function`` of this tensor, whose result has ``shape``."""
        return LazyTensor(tuple(shape), self.dtype, lambda: function(self.load()))


Weights = dict[str, LazyTensor]


def open_weights(path: Path) -> Weights:
    """Names and lazy tensors of a weight file or of a directory with weight files.

    Directories may hold ``model.safetensors``, shards with ``model.safetensors.index.json``, shards
    ``model_{n}.safetensors`` (reference package), or a single file of any kind.

    Raises:
        FileNotFoundError: nothing there, or a shard is missing.
        ValueError: a file is damaged or foreign.
    """
    if path.is_file():
        return _open_pickled(path) if path.suffix in PICKLED else _open_safetensors(path)
    if not path.is_dir():
        raise FileNotFoundError(f"'{path}' does not exist")
    if (path / INDEX_NAME).is_file():
        return _open_indexed(path)
    return _merge(_weight_files(path))


def _weight_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    for pattern, first in ((r"model_(\d+)\.safetensors", 0), (r"model-(\d+)-of-(\d+)\.safetensors", 1)):
        found = {int(m[1]): m for p in directory.iterdir() if (m := re.fullmatch(pattern, p.name))}
        if not found:
            continue
        last = max(found) if first == 0 else int(next(iter(found.values()))[2])
        for number in range(first, last + 1):
            if number not in found:
                raise FileNotFoundError(
                    f"'{directory}' is incomplete: weight shard {number} of {first} to {last} is missing"
                )
        return [directory / found[n].string for n in sorted(found)]
    kinds = (".safetensors", *PICKLED)
    others = sorted(p for p in directory.iterdir() if p.suffix in kinds and p.is_file())
    if len(others) == 1:
        return others
    hint = ""
    if others:
        hint = f"; found {', '.join(p.name for p in others[:5])}: give the path of one of them"
    elif (directory / "model").is_dir():
        hint = f"; did you mean '{directory / 'model'}'?"
    raise FileNotFoundError(
        f"no model weights in '{directory}': expected model.safetensors, {INDEX_NAME} "
        f"or model_0.safetensors{hint}"
    )


def _merge(files: list[Path]) -> Weights:
    weights: Weights = {}
    for file in files:
        part = open_weights(file)
        for name in part:
            if name in weights:
                raise ValueError(f"tensor '{name}' appears in more than one file of '{file.parent}'")
        weights |= part
    return weights


def _open_indexed(directory: Path) -> Weights:
    index = directory / INDEX_NAME
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"'{index}' has no weight_map")
    shards: dict[str, Weights] = {}
    weights: Weights = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"'{index}' places tensor '{name}' in {shard!r}, which is not a file name")
        if shard not in shards:
            if not (directory / shard).is_file():
                raise FileNotFoundError(f"'{directory}' is incomplete: weight shard '{shard}' is missing")
            shards[shard] = _open_safetensors(directory / shard)
        if name not in shards[shard]:
            raise ValueError(f"'{directory / shard}' lacks tensor '{name}', which the index places there")
        weights[name] = shards[shard][name]
    return weights


def _open_safetensors(path: Path) -> Weights:
    from safetensors import safe_open

    with path.open("rb") as stream:
        if stream.read(30).startswith(b"version https://git-lfs"):
            raise ValueError(f"'{path}' is a Git LFS pointer, not the weights: run 'git lfs pull'")
    try:
        file = safe_open(str(path), framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own error type derives from Exception only
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"'{path}' is not a readable safetensors file (truncated?): {reason}") from None
    weights: Weights = {}
    for name, part in slices.items():
        if part.get_dtype() not in SAFETENSORS_DTYPES:
            raise ValueError(f"tensor '{name}' in '{path}' has the unsupported type {part.get_dtype()}")
        dtype, shape = SAFETENSORS_DTYPES[part.get_dtype()], tuple(part.get_shape())
        weights[name] = LazyTensor(shape, dtype, lambda name=name: file.get_tensor(name))
    return weights


def _open_pickled(path: Path) -> Weights:
    try:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files older than the zip format cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"'{path}' is damaged or holds Python objects besides tensors, which are not loaded because they "
            "can run code: save the model's state_dict alone, best as safetensors"
        ) from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable PyTorch file: {_first_line(error)}") from None
    for key in ("state_dict", "model_state_dict", "model"):  # how training programs nest it
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"'{path}' is not a state_dict: expected a mapping of names to tensors")
    return {str(name): LazyTensor.of(tensor) for name, tensor in content.items()}


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
