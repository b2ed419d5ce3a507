"""Saving is all or nothing, streams, and loading never holds two copies."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import openxlstm
from openxlstm.checkpoint import byte_tokenizer, writing
from openxlstm.checkpoint.weights import LazyTensor, open_weights
from openxlstm.checkpoint.writing import plan_shards, write_safetensors


def _names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def test_safetensors_files(tmp_path: Path) -> None:
    """Every type and shape, readable by the library, large tensors aligned for memory maps."""
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "odd": torch.arange(7, dtype=torch.int8),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(64, 3).bfloat16(),
        "double": torch.randn(5).double(),
        "transposed": torch.randn(64, 32).t(),
        "count": torch.arange(5),
    }
    weights = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "m.safetensors", weights)
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    mapped = open_weights(tmp_path / "m.safetensors")
    for name in ("brain", "transposed"):
        assert mapped[name].load().data_ptr() % 64 == 0


def test_sharding() -> None:
    weights = {str(n): LazyTensor.of(torch.zeros(25)) for n in range(5)}
    files, index = plan_shards(weights, 250, "huggingface")
    assert [list(part) for part in files.values()] == [["0", "1"], ["2", "3"], ["4"]]
    assert next(iter(files)) == "model-00001-of-00003.safetensors"
    assert index is not None
    files, index = plan_shards(weights, 1, "reference")
    assert list(files) == [f"model_{n}.safetensors" for n in range(5)]
    assert index is None
    assert list(plan_shards(weights, 1e9, "reference")[0]) == ["model.safetensors"]
    with pytest.raises(ValueError, match="must be positive, got 0"):
        plan_shards(weights, 0, "reference")


def test_replacing_an_older_checkpoint(tmp_path: Path, forge) -> None:
    target = tmp_path / "m"
    first, second = forge.random_large(num_blocks=3), forge.random_large(num_blocks=1)
    openxlstm.save_pretrained(first, target, max_shard_bytes=200_000, tokenizer=byte_tokenizer())
    (target / "notes.txt").write_text("mine")
    (target / "runs").mkdir()
    openxlstm.save_pretrained(second, target)
    assert _names(target) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "notes.txt", "runs"),
    }
    model, _ = openxlstm.load_pretrained(target)
    assert torch.equal(model(torch.arange(5)[None]), second(torch.arange(5)[None]))
    openxlstm.save_pretrained(first, target, layout="reference")
    assert openxlstm.load_pretrained(target)[0].config.num_blocks == 3
    assert "config.json" not in _names(target)


def test_deep_and_empty_targets(tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch) -> None:
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    openxlstm.save_pretrained(forge.random_large(), ".")
    for path in (tmp_path / "a" / "b" / "c", tmp_path / "empty"):
        openxlstm.load_pretrained(path)
        assert not [name for name in _names(path.parent) if name.endswith(".tmp")]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is a file"):
        openxlstm.save_pretrained(forge.random_large(), tmp_path / "file")


@pytest.mark.parametrize(
    ("existing", "fails_at"),
    [*((e, f) for e in (False, True) for f in ("weights", "sync", "estimate")), (False, "rename")],
)
def test_full_disk(
    tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch, existing: bool, fails_at: str
) -> None:
    """One error, and the directory is as before."""
    target = tmp_path / "m"
    old, new = forge.random_large(num_blocks=1), forge.random_large(num_blocks=2)
    if existing:
        openxlstm.save_pretrained(old, target)
    before = {p: p.read_bytes() for p in target.glob("*")} if existing else {}
    calls = 0

    def full(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1 or fails_at in ("estimate", "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails_at == "weights":
        real = writing.write_safetensors

        def partly(path: Path, weights: dict[str, LazyTensor]) -> None:
            real(path, dict(list(weights.items())[:3]))
            full()

        monkeypatch.setattr(writing, "write_safetensors", partly)
    elif fails_at == "sync":
        monkeypatch.setattr(os, "fsync", full)
    elif fails_at == "rename":
        monkeypatch.setattr(os, "replace", full)
    else:
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    message = "it needs 0.00 GB" if fails_at == "estimate" else "No space left on device"
    with pytest.raises(OSError, match=rf"cannot save the checkpoint '.*m': {message}") as caught:
        openxlstm.save_pretrained(new, target, max_shard_bytes=100_000)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert _names(tmp_path) == ({"m"} if existing else set())
    assert {p: p.read_bytes() for p in target.glob("*")} == before
    if existing:
        openxlstm.load_pretrained(target)


def test_an_interrupted_replacement_is_noticed(
    tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two renames: no configuration, so never a silent mixture of two models."""
    openxlstm.save_pretrained(forge.random_large(num_blocks=1), tmp_path / "m")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        openxlstm.save_pretrained(forge.random_large(num_blocks=2), tmp_path / "m")
    monkeypatch.undo()
    assert "config.json" not in _names(tmp_path / "m")
    assert not [name for name in _names(tmp_path / "m") if name.endswith(".tmp")]


MEMORY = """
import resource, sys
import torch
import openxlstm

openxlstm.load_pretrained(sys.argv[2])  # everything imported, every pool warm


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


start, start_anonymous = peak(), anonymous()
dtype = None if sys.argv[3] == "stored" else sys.argv[3]
model, _ = openxlstm.load_pretrained(sys.argv[1], dtype=dtype)
assert all(bool(p.sum().isfinite()) for p in model.parameters())  # touch everything
print(peak() - start, anonymous() - start_anonymous)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_one_copy(tmp_path: Path, forge) -> None:
    """130 MB in three shards: as stored it stays in the page cache, converted it exists once, converted."""
    model = forge.random_large(embedding_dim=512, vocab_size=26_000, num_heads=4)
    size = sum(p.numel() * 4 for p in model.parameters())
    openxlstm.save_pretrained(model, tmp_path / "m", max_shard_bytes=6e7)
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "small")
    del model
    slack = 25_000_000
    for dtype, converted in (("stored", 0.0), ("bfloat16", 0.5)):
        arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "m"), str(tmp_path / "small"), dtype]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True)
        peak, anonymous = (int(word) for word in result.stdout.split())
        assert anonymous < converted * size + slack
        assert peak < (1 + converted) * size + slack
