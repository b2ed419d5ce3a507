"""Conversion in every direction is lossless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import openxlstm
from openxlstm.checkpoint import byte_tokenizer, convert
from openxlstm.config import config_to_dict
from openxlstm.models import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("fields", [{}, {"use_bias": True, "v_dim_factor": 2.0}], ids=["plain", "biases"])
@pytest.mark.parametrize("shard", [5e9, 30_000])
def test_large_round_trip(tmp_path: Path, forge, fields: dict[str, Any], shard: float) -> None:
    """Hugging Face -> reference fused -> openxlstm -> reference single -> Hugging Face."""
    model = forge.random_large(ffn_dim=200, **fields)
    if model.config.use_bias:
        torch.nn.init.zeros_(model.backbone.out_norm.bias)
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    openxlstm.save_pretrained(model, a, tokenizer=byte_tokenizer())
    convert(a, b, to="reference", weight_mode="fused", max_shard_bytes=shard)
    convert(b, c, to="openxlstm", max_shard_bytes=shard)
    convert(c, d, to="reference", max_shard_bytes=shard)
    convert(d, e, to="huggingface")
    assert _same(_tensors(a), _tensors(e))
    assert (a / "config.json").read_text() == (e / "config.json").read_text()
    assert (a / "tokenizer.json").read_text() == (e / "tokenizer.json").read_text()
    single = model.state_dict()
    assert _same(_tensors(d), single)
    assert _same(_tensors(b), forge.fused(single))
    assert (b / "model_0.safetensors").exists() == (shard < 5e9)
    settings = yaml.safe_load((b / "config.yaml").read_text())
    assert settings["weight_mode"] == "fused"
    assert not {"ffn_dim", "ops_backend", "tie_word_embeddings"} & settings.keys()
    hidden = settings["ffn_proj_factor"] * 64 + settings["ffn_round_up_to_multiple_of"] - 1
    multiple = settings["ffn_round_up_to_multiple_of"]
    assert int(hidden // multiple) * multiple == 200
    tokens = torch.arange(20)[None]
    for directory in (a, b, c, d, e):
        assert torch.equal(openxlstm.load_pretrained(directory)[0](tokens), model(tokens))


def _language_model(**fields: Any) -> xLSTMLMModel:
    config = xLSTMLMModelConfig(
        mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=2, proj_factor=1.5)),
        slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=2)),
        **({"embedding_dim": 32, "num_blocks": 3, "vocab_size": 20, "slstm_at": [1]} | fields),
    )
    model = xLSTMLMModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("fields", [{}, {"tie_weights": True, "bias": True, "add_post_blocks_norm": False}])
def test_stack_round_trip(tmp_path: Path, forge, fields: dict[str, Any]) -> None:
    model = _language_model(**fields)
    a, b, c = (tmp_path / name for name in "abc")
    openxlstm.save_pretrained(model, a)
    convert(a, b, to="reference", slstm_layout="cuda")
    convert(b, c, to="openxlstm")
    assert _same(_tensors(b), forge.cuda_slstm(model.state_dict()))
    assert _same(_tensors(a), _tensors(c))
    settings = yaml.safe_load((b / "config.yaml").read_text())
    assert settings["slstm_block"]["slstm"]["backend"] == "cuda"
    tokens = torch.arange(20)[None]
    for directory in (a, b, c):
        again = openxlstm.load_pretrained(directory)[0]
        assert torch.equal(again(tokens), model(tokens))
        assert (again.lm_head.weight is again.token_embedding.weight) == model.config.tie_weights
    assert openxlstm.load_pretrained(a)[0].config == model.config


@pytest.mark.parametrize("kind", ["default", "all_slstm", "ratio"])
def test_stacks_without_embedding(tmp_path: Path, kind: str) -> None:
    small = sLSTMBlockConfig(sLSTMLayerConfig(num_heads=2), None)
    fields: dict[str, Any] = {
        "default": {},
        "all_slstm": {"slstm_block": small, "slstm_at": "all"},
        "ratio": {"slstm_at": "[1:1]", "mlstm_block": mLSTMBlockConfig()},
    }[kind]
    model = xLSTMBlockStack(xLSTMBlockStackConfig(embedding_dim=64, num_blocks=2, **fields)).eval()
    openxlstm.save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="reference")
    convert(tmp_path / "b", tmp_path / "c", to="openxlstm")
    x = torch.randn(1, 7, 64)
    assert openxlstm.load_pretrained(tmp_path / "a")[0].config == model.config
    for name in "abc":
        assert torch.equal(openxlstm.load_pretrained(tmp_path / name)[0](x), model(x))


def test_dtype(tmp_path: Path, forge) -> None:
    model = forge.random_large()
    openxlstm.save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="huggingface", dtype="bfloat16")
    for name, tensor in _tensors(tmp_path / "b").items():
        assert torch.equal(tensor, _tensors(tmp_path / "a")[name].bfloat16())
    assert '"dtype": "bfloat16"' in (tmp_path / "b" / "config.json").read_text()


def test_fused_models_stay_fused(tmp_path: Path, forge) -> None:
    model = forge.random_large(weight_mode="fused")
    openxlstm.save_pretrained(model, tmp_path / "a", layout="openxlstm")
    again, _ = openxlstm.load_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert _same(again.state_dict(), model.state_dict())


def test_state_dict_of_a_fused_model(tmp_path: Path, forge) -> None:
    """What a training run writes: the model's own keys beside its own configuration."""
    model = forge.random_large(weight_mode="fused", tie_word_embeddings=True)
    config = {"model_type": "xlstm_large"} | config_to_dict(model.config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forge.write_hf(tmp_path / "a", config, tensors)
    again, _ = openxlstm.load_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert _same(again.state_dict(), model.state_dict())


def test_in_place(tmp_path: Path, forge) -> None:
    """The source is memory-mapped while it is replaced."""
    model = forge.random_large()
    openxlstm.save_pretrained(model, tmp_path / "a", max_shard_bytes=100_000)
    convert(tmp_path / "a", tmp_path / "a", to="reference", weight_mode="fused")
    assert sorted(p.name for p in (tmp_path / "a").glob("*.safetensors")) == ["model.safetensors"]
    again, _ = openxlstm.load_pretrained(tmp_path / "a")
    assert _same(again.state_dict(), model.state_dict())


def test_errors(tmp_path: Path) -> None:
    openxlstm.save_pretrained(_language_model(), tmp_path / "a")
    with pytest.raises(ValueError, match="xLSTMLarge models only, this is an 'xlstm_lm'"):
        convert(tmp_path / "a", tmp_path / "b", to="huggingface")
    with pytest.raises(ValueError, match="Did you mean 'huggingface'"):
        convert(tmp_path / "a", tmp_path / "b", to="hugingface")  # pyright: ignore
    with pytest.raises(ValueError, match="only in the reference layout"):
        convert(tmp_path / "a", tmp_path / "b", to="openxlstm", slstm_layout="cuda")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "b", to="openxlstm")
    assert not (tmp_path / "b").exists()
