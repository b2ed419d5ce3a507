"""Checkpoint directories: whole or not there, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from openxlstm.training import CheckpointStore
from openxlstm.training import checkpointing as module

TENSORS = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)},
    "optimizer": {"step/weight": torch.tensor(3.0), "exp_avg/weight": torch.ones(2, 3)},
}


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, TENSORS, {"position": [1, 2.5, None]}, {"config.json": "{}"})


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_round_trip_and_retention(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    assert store.latest() is None
    assert store.load_latest() is None
    for step in (5, 10, 15):
        save(store, step)
    assert names(tmp_path / "c") == ["step_00000010", "step_00000015"]
    loaded = store.load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.state["position"]) == (15, [1, 2.5, None])
    for group, tensors in TENSORS.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[group][name], tensor)
            assert loaded.tensors[group][name].dtype == tensor.dtype
    save(CheckpointStore(tmp_path / "c", keep=0), 20)
    assert len(store.paths()) == 3


def test_tied_and_transposed_tensors(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"model": {"a": weight, "b": weight, "c": weight.T, "d": weight[:1]}}, {})
    tensors = store.load(path).tensors["model"]
    assert torch.equal(tensors["a"], weight)
    assert torch.equal(tensors["b"], weight)
    assert torch.equal(tensors["c"], weight.T)
    assert torch.equal(tensors["d"], weight[:1])


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    store.save(5, {"model": {"w": torch.ones(1)}}, {"again": True})
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.state["again"] is True
    assert set(loaded.tensors) == {"model"}
    assert names(tmp_path) == ["step_00000005"]


class Killed(BaseException):
    """Stands for the end of the process: nothing that follows it may be relied on."""


@pytest.mark.parametrize("moment", ["weights", "manifest", "flush", "rename"])
def test_a_crash_while_writing_costs_nothing_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a dead process does not tidy up
        if moment == "weights":
            patch.setattr(module, "save_file", die)
        elif moment == "manifest":
            write = module._write_json
            patch.setattr(
                module, "_write_json", lambda p, v: die() if p.name == module.MANIFEST else write(p, v)
            )
        elif moment == "flush":
            patch.setattr(module, "_flush", die)
        else:
            patch.setattr(module.os, "rename", die)
        with pytest.raises(Killed):
            save(store, 10)
    assert len(names(tmp_path)) == 2
    again = CheckpointStore(tmp_path)
    loaded = again.load_latest()
    assert loaded is not None
    assert loaded.step == 5
    again.clean()
    assert names(tmp_path) == ["step_00000005"]
    save(again, 10)
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 5)
    with files_limited_to(5000), pytest.raises(OSError, match="could not write checkpoint") as caught:
        store.save(10, {"model": {"weight": torch.zeros(100_000)}}, {})
    assert caught.value.errno == errno.EFBIG
    assert "latest intact checkpoint is" in str(caught.value)
    assert "step_00000005" in str(caught.value)
    assert names(tmp_path) == ["step_00000005"]
    assert store.latest() == tmp_path / "step_00000005"


def test_a_full_disk_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = CheckpointStore(tmp_path)
    with pytest.raises(OSError, match="No space left on device; there is no earlier checkpoint") as caught:
        save(store, 10)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_truncated_and_foreign_checkpoints_are_skipped_and_named(tmp_path: Path) -> None:
    messages: list[str] = []
    store = CheckpointStore(tmp_path, keep=0, report=messages.append)
    for step in (5, 10, 15, 20, 25):
        save(store, step)
    with open(tmp_path / "step_00000010" / "model.safetensors", "rb+") as file:
        file.truncate(40)
    (tmp_path / "step_00000015" / "state.json").unlink()
    (tmp_path / "step_00000020" / "checkpoint.json").write_text("{")
    (tmp_path / "step_00000025" / "checkpoint.json").unlink()
    (tmp_path / "step_12").mkdir()
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 5
    assert store.latest() == tmp_path / "step_00000005"
    assert [message.split(" is ")[0].split("_")[-1].rstrip("'") for message in messages] == [
        "00000025", "00000020", "00000015", "00000010",
    ]  # fmt: skip
    assert "has no readable checkpoint.json" in messages[0]
    assert "cannot be understood" in messages[1]
    assert "state.json is missing" in messages[2]
    assert "is truncated: model.safetensors has 40 bytes instead of" in messages[3]


def test_damage_that_keeps_the_size_is_found_on_reading(tmp_path: Path) -> None:
    messages: list[str] = []
    store = CheckpointStore(tmp_path, report=messages.append)
    save(store, 5)
    path = save(store, 10) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 5
    assert "is damaged" in messages[0]


def test_no_readable_checkpoint_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 5)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .* has format 99"):
        store.load_latest()


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    (save(store, 20) / "state.json").unlink()
    assert save(store, 10).is_dir()
    assert names(tmp_path) == ["step_00000010"]
    store.keep = 2
    (save(store, 30) / "state.json").unlink()
    save(store, 15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
