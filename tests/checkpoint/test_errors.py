"""A bad checkpoint gives one sentence that names what is wrong, and nothing else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import openxlstm


@pytest.fixture
def good(tmp_path: Path, forge) -> Path:
    """A sound checkpoint in three shards."""
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "m", max_shard_bytes=200_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3
    return tmp_path / "m"


def _edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def _edit_shard(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model-00002-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _refused(path: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        openxlstm.load_pretrained(path)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_missing(tmp_path: Path, good: Path) -> None:
    _refused(tmp_path / "nothing", FileNotFoundError, "does not exist")
    (tmp_path / "empty").mkdir()
    _refused(
        tmp_path / "empty", FileNotFoundError, "no model weights in .*empty': expected model.safetensors"
    )
    (tmp_path / "run" / "model").mkdir(parents=True)
    _refused(tmp_path / "run", FileNotFoundError, r"did you mean '.*run.model'\?$")
    (good / "model-00003-of-00003.safetensors").unlink()
    _refused(good, FileNotFoundError, "weight shard 'model-00003-of-00003.safetensors' is missing")
    (good / "model.safetensors.index.json").unlink()
    _refused(good, FileNotFoundError, "weight shard 3 of 1 to 3 is missing")


def test_shards_without_index(good: Path) -> None:
    (good / "model.safetensors.index.json").unlink()
    openxlstm.load_pretrained(good)


def test_numbered_shards(good: Path) -> None:
    (good / "model.safetensors.index.json").unlink()
    for n in (0, 1, 2):
        (good / f"model-0000{n + 1}-of-00003.safetensors").rename(good / f"model_{n}.safetensors")
    openxlstm.load_pretrained(good)
    (good / "model_2.safetensors").rename(good / "last")
    _refused(good, ValueError, "lacks tensor|block|does not fit")
    (good / "last").rename(good / "model_2.safetensors")
    (good / "model_1.safetensors").unlink()
    _refused(good, FileNotFoundError, "weight shard 1 of 0 to 2 is missing")


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_truncated(good: Path, size: int) -> None:
    path = good / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _refused(good, ValueError, r"model-00002-of-00003.safetensors' is not a readable safetensors file")


def test_foreign_files(tmp_path: Path, good: Path) -> None:
    path = good / "model-00001-of-00003.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _refused(good, ValueError, "Git LFS pointer")
    path.write_text("<html>404: Not Found</html>")
    _refused(good, ValueError, "not a readable safetensors file")
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, tmp_path / "llama.safetensors")
    _refused(tmp_path / "llama.safetensors", ValueError, "names like 'layers.0.attention.wq.weight'")
    save_file({}, tmp_path / "none.safetensors")
    _refused(tmp_path / "none.safetensors", ValueError, "it has no tensors")
    _edit_config(good, model_type="llama")
    _refused(good, ValueError, "model of type 'llama', which is not an xLSTM")


def test_damaged_json(good: Path) -> None:
    text = (good / "config.json").read_text()
    (good / "config.json").write_text(text[: len(text) // 2])
    _refused(good, ValueError, "config.json' is not a valid configuration file")
    (good / "config.json").write_text(text)
    for index, message in (("{", "not a valid"), ('{"weight_map": {}}', "has no weight_map")):
        (good / "model.safetensors.index.json").write_text(index)
        _refused(good, ValueError, message)
    (good / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    _refused(good, ValueError, "which is not a file name")
    (good / "model.safetensors.index.json").write_text(
        '{"weight_map": {"absent": "model-00001-of-00003.safetensors"}}'
    )
    _refused(good, ValueError, "lacks tensor 'absent', which the index places there")


def test_tensors_that_do_not_fit(good: Path) -> None:
    name = "backbone.blocks.1.mlstm_layer.k.weight"
    index = json.loads((good / "model.safetensors.index.json").read_text())
    assert index["weight_map"][name] == "model-00002-of-00003.safetensors"
    _edit_shard(good, lambda t: t.update({name: t[name][:10].clone()}))
    _refused(good, ValueError, rf"tensor '{name}' .* has shape \(10, 64\), expected \(32, 64\)")
    _edit_shard(good, lambda t: t.update({"backbone.rotary": t.pop(name)}))
    _refused(good, ValueError, "lacks tensor 'backbone.blocks.1.mlstm_layer.k.weight', which the index")
    del index["weight_map"][name]
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(good, ValueError, f"lacks tensor '{name}'$")
    index["weight_map"]["backbone.rotary"] = "model-00002-of-00003.safetensors"
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    _edit_shard(good, lambda t: t.update({name: torch.zeros(32, 64)}))
    index["weight_map"][name] = "model-00002-of-00003.safetensors"
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(good, ValueError, "holds tensor 'backbone.rotary', which xLSTMLarge does not have")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_blocks", 3), ("embedding_dim", 128), ("vocab_size", 51), ("num_heads", 4)],
)
def test_configuration_that_does_not_fit(good: Path, field: str, value: int) -> None:
    _edit_config(good, **{field: value})
    _refused(good, ValueError, f"does not fit its configuration: {field} is {value} there, but the weights")


def test_own_configuration_is_checked(tmp_path: Path, forge) -> None:
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "m", layout="openxlstm")
    _edit_config(tmp_path / "m", num_hedas=3)
    _refused(tmp_path / "m", ValueError, "unknown field 'num_hedas'.* Did you mean 'num_heads'")


class Payload:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


def test_pickles_run_no_code(tmp_path: Path) -> None:
    torch.save({"blocks.0.xlstm.a": Payload()}, tmp_path / "zip.pt")
    _refused(tmp_path / "zip.pt", ValueError, "can run code")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload()))
    _refused(tmp_path / "raw.pt", ValueError, "raw.pt'")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    _refused(tmp_path / "list.pt", ValueError, "is not a state_dict")
    (tmp_path / "text.pt").write_text("hello")
    _refused(tmp_path / "text.pt", ValueError, "text.pt'")
    (tmp_path / "empty.pt").write_bytes(b"")
    _refused(tmp_path / "empty.pt", ValueError, "empty.pt'")


def test_slstm_shapes(tmp_path: Path, golden, forge) -> None:
    _, tensors = golden("block_stack_mixed_e32")
    parameters = forge.parameters_of(tensors)
    name = "blocks.1.xlstm.slstm_cell._recurrent_kernel_"
    save_file(parameters | {name: torch.zeros(4, 8, 8)}, tmp_path / "m.safetensors")
    _refused(tmp_path / "m.safetensors", ValueError, r"has shape \(4, 8, 8\); an sLSTM recurrent matrix is")
    cuda = forge.cuda_slstm(parameters) | {"blocks.1.xlstm.slstm_cell._bias_": torch.zeros(7)}
    save_file(cuda, tmp_path / "m.safetensors")
    _refused(tmp_path / "m.safetensors", ValueError, r"_bias_' has shape \(7,\), expected \(128,\)")


def test_settings(good: Path) -> None:
    with pytest.raises(ValueError, match="int8"):
        openxlstm.load_pretrained(good, dtype="int8")
    with pytest.raises(ValueError, match="device"):
        openxlstm.load_pretrained(good, device="abacus")
    with pytest.raises(ValueError, match="cannot save a Linear as a checkpoint; known models: xLSTMLMModel"):
        openxlstm.save_pretrained(torch.nn.Linear(2, 2), good)
