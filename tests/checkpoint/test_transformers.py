"""Every xLSTMLarge that is saved, transformers loads, with equal logits; and the other way round."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import openxlstm
from openxlstm.checkpoint import byte_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "plain": {"embedding_dim": 128},
    "widths that are no multiples of 64": {},
    "one third": {"embedding_dim": 96, "num_heads": 4, "qk_dim_factor": 1 / 3},
    "odd feed-forward": {"embedding_dim": 128, "ffn_dim": 173},
    "JAX feed-forward": {"embedding_dim": 128, "ffn_dim": 448},
    "other factors": {
        "embedding_dim": 128,
        "v_dim_factor": 2.0,
        "qk_dim_factor": 1.0,
        "ffn_proj_factor": 1.5,
    },
    "no soft caps": {"embedding_dim": 128, "gate_soft_cap": None, "output_logit_soft_cap": None},
    "other caps and epsilons": {
        "gate_soft_cap": 5.0,
        "output_logit_soft_cap": 3.0,
        "eps": 1e-3,
        "norm_eps": 1e-2,
    },
    "tied": {"tie_word_embeddings": True},
    "biases": {"use_bias": True},
    "chunks": {"chunk_size": 48},
    "fused": {"weight_mode": "fused"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_equal_logits(tmp_path: Path, forge, rel_error, transformers_model, fields: dict[str, Any]) -> None:
    model = forge.random_large(**fields)
    if fields.get("use_bias"):
        torch.nn.init.zeros_(model.backbone.out_norm.bias)  # theirs has none
    openxlstm.save_pretrained(model, tmp_path / "m")
    theirs = transformers_model(tmp_path / "m")
    tokens = torch.randint(50, (2, 70))
    with torch.no_grad():
        for length in (70, 1):
            ours = model(tokens[:, :length])
            assert rel_error(theirs(tokens[:, :length]).logits, ours) < 3e-5
        again, _ = openxlstm.load_pretrained(tmp_path / "m")
        assert rel_error(again(tokens), model(tokens)) < (1e-5 if fields.get("weight_mode") else 0.0) + 1e-12
    assert again.config.ffn_hidden_dim == model.config.ffn_hidden_dim
    assert again.config.gate_soft_cap == model.config.gate_soft_cap
    assert (again.lm_head.weight is again.embedding.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("width", [64, 128])
def test_generation(tmp_path: Path, forge, transformers_model, width: int) -> None:
    """With their cache (128), and where it would crash (64) without."""
    model = forge.random_large(embedding_dim=width)
    openxlstm.save_pretrained(model, tmp_path / "m")
    theirs = transformers_model(tmp_path / "m")
    assert theirs.config.use_cache == (width == 128)
    tokens = torch.tensor([[0, 5, 9]])
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert 0 not in expected[:, 1:]
    assert torch.equal(theirs.generate(tokens, max_new_tokens=6, do_sample=False), expected)


def test_bfloat16_and_shards(tmp_path: Path, forge, rel_error, transformers_model) -> None:
    model = forge.random_large(embedding_dim=128).bfloat16()
    openxlstm.save_pretrained(model, tmp_path / "m", max_shard_bytes=100_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())
    theirs = transformers_model(tmp_path / "m")
    assert theirs.dtype == torch.bfloat16
    named = dict(theirs.named_parameters())
    again, _ = openxlstm.load_pretrained(tmp_path / "m")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, named[name.replace("embedding.", "backbone.embeddings.")])
    with torch.no_grad():
        tokens = torch.randint(50, (1, 20))
        assert rel_error(theirs.float()(tokens).logits, model.float()(tokens)) < 3e-5


def test_their_checkpoints(tmp_path: Path, rel_error) -> None:
    """A model made and saved by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import xLSTMConfig, xLSTMForCausalLM

        config = xLSTMConfig(hidden_size=128, num_hidden_layers=2, num_heads=2, vocab_size=40)
        theirs = xLSTMForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        theirs.save_pretrained(tmp_path / "m", max_shard_size="400KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    tokens = torch.randint(40, (2, 30))
    with torch.no_grad():
        assert rel_error(model(tokens), theirs(tokens).logits) < 3e-5


def test_special_tokens(tmp_path: Path, forge, transformers_model) -> None:
    """End of text is id 0, and padding that ends up in a text decodes to nothing."""
    openxlstm.save_pretrained(forge.random_large(vocab_size=257), tmp_path / "m", tokenizer=byte_tokenizer())
    theirs = transformers_model(tmp_path / "m")
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    _, tokenizer = openxlstm.load_pretrained(tmp_path / "m")
    assert tokenizer is not None
    assert tokenizer.to_json() == byte_tokenizer().to_json()


def test_what_transformers_cannot_represent(tmp_path: Path, forge) -> None:
    """It is still saved, in the layout of this package, and the user is told."""
    for fields in ({"use_bias": True}, {"add_out_norm": False}):
        model = forge.random_large(**fields)
        with pytest.raises(ValueError, match="cannot write the huggingface layout: transformers"):
            openxlstm.save_pretrained(model, tmp_path / "m", layout="huggingface")
        assert not (tmp_path / "m").exists()
        with pytest.warns(UserWarning, match="own layout: transformers"):
            openxlstm.save_pretrained(model, tmp_path / "m")
        again, _ = openxlstm.load_pretrained(tmp_path / "m")
        assert again.config == model.config
        tokens = torch.arange(9)[None]
        assert torch.equal(again(tokens), model(tokens))
        for path in (tmp_path / "m").iterdir():
            path.unlink()
        (tmp_path / "m").rmdir()
