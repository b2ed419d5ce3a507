"""Checkpoints of a run: directories that are either complete or not there.

    <run>/checkpoints/step_00001000/
        model.safetensors       parameters and buffers
        optimizer.safetensors   moments, by parameter name
        random.safetensors      generator states
        config.json, ...        the model's description and tokenizer, as in any saved model
        state.json              step, settings, model description, data position
        checkpoint.json         written last: the size of every other file

A checkpoint is written under a temporary name, flushed to the disk, and renamed; a crash or a full disk at
any moment leaves the earlier ones as they were. Nothing is ever unpickled. Reading takes the latest
checkpoint that is whole and says which ones it had to skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openxlstm.runtime import sync_directory

FORMAT = 1
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step_(\d{8,})")


class Checkpoint(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    step: int
    state: dict[str, Any]
    """What JSON holds: settings, positions."""
    tensors: dict[str, dict[str, Tensor]]
    """Group (``"model"``, ``"optimizer"``, ``"random"``) to named tensors, on the CPU."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they lie; created on the first :meth:`save`.
        keep: number of latest checkpoints that stay; 0 keeps all.
        report: receives one sentence for each checkpoint that had to be skipped.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.directory = Path(directory)
        self.keep = keep
        self.report = report

    def paths(self) -> list[Path]:
        """Directories that are named like checkpoints, oldest first, whole or not."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step_of)

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` updates lies or would lie."""
        return self.directory / f"step_{step:08d}"

    def latest(self) -> Path | None:
        """The latest whole checkpoint (its files are checked, not read), or None."""
        for path in reversed(self.paths()):
            if _defect(path) is None:
                return path
        return None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a checkpoint, make it durable, and delete those beyond ``keep``.

        Args:
            step: updates done.
            tensors: group name to named tensors; each group becomes one file.
            state: what JSON holds.
            texts: further files, name to content.

        Raises:
            OSError: it could not be written, on a full disk for instance; the earlier ones are untouched.
        """
        path = self.path(step)
        temporary = self.directory / f".{path.name}.{os.getpid()}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for group, values in tensors.items():
                save_file(_storable(values), temporary / f"{group}.safetensors")
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            _write_json(temporary / "state.json", {"step": step, **state})
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            _write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": sizes})
            for file in temporary.iterdir():
                _flush(file)
            sync_directory(temporary)
            self._publish(temporary, path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(path, error) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._delete_old(path)
        return path

    def load(self, path: Path) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            ValueError: it is incomplete, damaged, or not a checkpoint of this program.
        """
        defect = _defect(path)
        if defect is not None:
            raise ValueError(f"checkpoint '{path}' {defect}")
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            groups = [file.stem for file in sorted(path.glob("*.safetensors"))]
            tensors = {group: load_file(path / f"{group}.safetensors") for group in groups}
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"checkpoint '{path}' is damaged: {error}") from None
        return Checkpoint(path, int(state["step"]), state, tensors)

    def load_latest(self) -> Checkpoint | None:
        """Read the latest readable checkpoint, reporting those that are not; None if there are none at all.

        Raises:
            ValueError: there are checkpoints, but none is readable.
        """
        paths = self.paths()
        problems: list[str] = []
        for path in reversed(paths):
            try:
                return self.load(path)
            except ValueError as error:
                problems.append(str(error))
                self.report(f"{error}; trying the one before it")
        if problems:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in '{self.directory}' can be read: {problems[0]}"
            )
        return None

    def clean(self) -> None:
        """Delete what a crash during :meth:`save` left behind. Call when no other process writes here."""
        if self.directory.is_dir():
            for leftover in self.directory.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _publish(self, temporary: Path, path: Path) -> None:
        """Rename ``temporary`` to ``path``; an earlier attempt at the same step makes way first."""
        replaced = temporary.with_suffix(".old.tmp")
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _delete_old(self, written: Path) -> None:
        """Keep ``written`` and the latest whole ones; damaged ones go, as soon as enough others are there."""
        if not self.keep:
            return
        whole = [path for path in self.paths() if _defect(path) is None and path != written] + [written]
        if len(whole) < self.keep:
            return
        kept = whole[-self.keep :]
        for path in self.paths():
            if path in kept:
                continue
            doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            os.rename(path, doomed)  # never leave a checkpoint half deleted under its own name
            shutil.rmtree(doomed, ignore_errors=True)

    def _failure(self, path: Path, error: Exception) -> OSError:
        latest = self.latest()
        intact = f"the latest intact checkpoint is '{latest}'" if latest else "there is no earlier checkpoint"
        message = f"could not write checkpoint '{path}': {error}; {intact}"
        number = getattr(error, "errno", None) or _errno_in(str(error))
        failure = OSError(message)
        failure.errno = number
        return failure


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _defect(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, judged by its manifest, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
    except OSError:
        return f"is incomplete or not a checkpoint of this program: it has no readable {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"is damaged: its {MANIFEST} cannot be understood"
    if version != FORMAT:
        return f"has format {version!r}; this version reads format {FORMAT}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"is incomplete: {name} is missing"
        if file.stat().st_size != size:
            return f"is truncated: {name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory (tied weights are stored once per name)."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        key = tensor.untyped_storage().data_ptr()
        if key and (key in seen or tensor.untyped_storage().nbytes() != tensor.nbytes):
            tensor = tensor.clone()
        seen.add(key)
        result[name] = tensor
    return result


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _errno_in(text: str) -> int | None:
    """The number in ``"... (os error 28)"``, as safetensors reports errors of the operating system."""
    match = re.search(r"os error (\d+)", text)
    return int(match.group(1)) if match else None
