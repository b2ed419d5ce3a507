"""Published checkpoints of every kind load, with the published outputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import openxlstm
from openxlstm.checkpoint import byte_tokenizer
from openxlstm.checkpoint.architectures import large_config
from openxlstm.checkpoint.huggingface import config_files, declared_fields
from openxlstm.checkpoint.layouts import large_from_hf
from openxlstm.checkpoint.reading import Checkpoint
from openxlstm.checkpoint.weights import LazyTensor
from openxlstm.models import xLSTMBlockStack, xLSTMLarge, xLSTMLMModel


def output(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


# ------------------------------------------------------------------ Hugging Face and scaling-law directories


@pytest.mark.parametrize("keys", ["old", "new", "both"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face(tmp_path: Path, golden, forge, rel_error, keys: str, shards: int) -> None:
    case, tensors = golden("hf_causal_e64_h2_b2")
    config = forge.old_config | {"vocab_size": 48, "num_heads": 2, "qk_dim_factor": 1.0}
    if keys == "new":
        for name in ("embedding_dim", "num_blocks"):
            del config[name]
        config |= {"hidden_size": 64, "num_hidden_layers": 2}
    else:
        config |= {"embedding_dim": 64, "num_blocks": 2}
    if keys == "both":
        config = case["config"] | {"model_type": "xlstm"}
    forge.write_hf(tmp_path / "m", config, forge.parameters_of(tensors), shards)
    model, tokenizer = openxlstm.load_pretrained(tmp_path / "m")
    assert type(model) is xLSTMLarge
    assert tokenizer is None
    assert not model.training
    logits = output(model, tensors["in.idx"])
    assert rel_error(logits, tensors["f32.logits"]) < 3e-4


def test_scaling_law_directory(tmp_path: Path, golden, forge, rel_error) -> None:
    """Hugging Face names, old configuration, ``model_{n}.safetensors`` and neither index nor tokenizer."""
    _, tensors = golden("hf_causal_e64_h2_b2")
    config = forge.old_config | {"vocab_size": 48, "num_heads": 2, "qk_dim_factor": 1.0}
    config |= {"embedding_dim": 64, "num_blocks": 2}
    forge.write_hf(tmp_path / "m", config, {"x": torch.zeros(1)})
    (tmp_path / "m" / "model.safetensors").unlink()
    forge.write_numbered(tmp_path / "m", forge.parameters_of(tensors), 2)
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    assert rel_error(output(model, tensors["in.idx"]), tensors["f32.logits"]) < 3e-4


def test_a_configuration_may_be_bare_or_absent(tmp_path: Path, golden, forge, rel_error) -> None:
    _, tensors = golden("hf_causal_e64_h2_b2")
    forge.write_hf(tmp_path / "m", {"model_type": "xlstm"}, forge.parameters_of(tensors))
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        model, _ = openxlstm.load_pretrained(path)
        assert rel_error(output(model, tensors["in.idx"]), tensors["f32.logits"]) < 3e-4
    (tmp_path / "m" / "config.json").unlink()
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    assert rel_error(output(model, tensors["in.idx"]), tensors["f32.logits"]) < 3e-4


def test_widths_come_from_the_tensors(tmp_path: Path, forge) -> None:
    """The JAX program rounds the feed-forward width of E=768 to 2112, the PyTorch formula gives 2048."""
    shapes = forge.large_shapes(48, 2, 3, 36, 60, 137, 30, "backbone.embeddings.weight")
    config = forge.old_config | {"embedding_dim": 48, "num_blocks": 2, "num_heads": 3, "vocab_size": 30}
    forge.write_hf(tmp_path / "m", config, forge.random_tensors(shapes))
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    assert (model.config.qk_dim, model.config.v_dim, model.config.ffn_hidden_dim) == (36, 60, 137)
    assert output(model, torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 30)


def _meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    def unread() -> torch.Tensor:
        raise AssertionError("a weight was read")

    return {name: LazyTensor(shape, torch.float32, unread) for name, shape in shapes.items()}


def test_the_7b_table(forge) -> None:
    """All names and shapes of xLSTM-7b, on the meta device, without reading a number."""
    shapes = forge.large_shapes(4096, 32, 8, 2048, 4096, 10944, 50304, "backbone.embeddings.weight")
    weights = large_from_hf(_meta(shapes))
    config = large_config(weights, declared_fields(forge.old_config), "'7b'")
    model = Checkpoint("xlstm_large", config, weights).build_empty()
    assert sum(p.numel() for p in model.parameters()) == 6_865_424_896
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in weights.items()
    }
    written = config_files(config, torch.float32, None)["config.json"]
    assert written["ffn_proj_factor"] == 2.667
    same = (n for n in written if n in forge.old_config)
    changed = {n for n in same if written[n] != forge.old_config[n]}
    assert changed == {"eos_token_id", "chunkwise_kernel", "sequence_kernel", "step_kernel"}


@pytest.mark.parametrize(
    ("width", "blocks", "heads", "hidden", "count"),
    [(768, 12, 6, 2112, 164_110_224), (512, 8, 4, 1408, None)],
)
def test_scaling_law_shapes(
    forge, width: int, blocks: int, heads: int, hidden: int, count: int | None
) -> None:
    shapes = forge.large_shapes(width, blocks, heads, width // 2, width, hidden, 50304, "embedding.weight")
    fields = {"embedding_dim": width, "num_blocks": blocks, "num_heads": heads}
    config = large_config(_meta(shapes), forge.old_config | fields, "'m'")
    assert config.ffn_hidden_dim == hidden
    model = Checkpoint("xlstm_large", config, _meta(shapes)).build_empty()
    assert count is None or sum(p.numel() for p in model.parameters()) == count


def test_tied_embeddings(tmp_path: Path, forge) -> None:
    """Published tied models come with and without the output matrix."""
    shapes = forge.large_shapes(64, 1, 2, 32, 64, 192, 30, "backbone.embeddings.weight")
    tensors = forge.random_tensors(shapes)
    fields = {"embedding_dim": 64, "num_blocks": 1, "num_heads": 2, "vocab_size": 30}
    config = forge.old_config | fields | {"tie_word_embeddings": True}
    untied = tensors | {}
    del tensors["lm_head.weight"]
    forge.write_hf(tmp_path / "missing", config, tensors)
    both = tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"].clone()}
    forge.write_hf(tmp_path / "both", config, both)
    forge.write_hf(tmp_path / "differ", config, untied)
    x = torch.arange(10)[None]
    models = {n: openxlstm.load_pretrained(tmp_path / n)[0] for n in ("missing", "both", "differ")}
    for name in ("missing", "both"):
        assert models[name].lm_head.weight is models[name].embedding.weight
        assert models[name].config.tie_word_embeddings
    assert torch.equal(output(models["missing"], x), output(models["both"], x))
    assert torch.equal(models["differ"].lm_head.weight, untied["lm_head.weight"])


# ------------------------------------------------------------------ reference package


@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["large_e64_h2_b2", "large_bias_qk1_e32"])
def test_reference_package(
    tmp_path: Path, golden, forge, rel_error, name: str, shards: int, mode: str
) -> None:
    case, tensors = golden(name)
    parameters = forge.parameters_of(tensors)
    if mode == "fused":
        parameters = forge.fused(parameters)
        assert {n: list(t.shape) for n, t in parameters.items()} == case["fused_keys"]
    config = case["config"] | {"weight_mode": mode, "norm_eps": 1e-6, "mode": "inference"}
    forge.write_reference(tmp_path / "m", config, parameters, shards)
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    x = tensors["in.idx"][:, : tensors["f32.logits"].shape[1]]
    assert rel_error(output(model, x), tensors["f32.logits"]) < 3e-4


# ------------------------------------------------------------------ block stacks


def _stack_config(case: dict[str, Any]) -> dict[str, Any]:
    """The configuration file for a golden block stack, nested as published."""
    config = {"num_blocks": case["num_blocks"], "embedding_dim": 32, "slstm_at": case["slstm_at"]}
    config |= {"context_length": case.get("context_length", 8), "bias": case.get("bias", False)}
    config["mlstm_block"] = {"mlstm": dict(case.get("mlstm", {"num_heads": 4}))}
    if case["slstm_at"]:
        cell = {"backend": "cuda", "num_heads": 4, "conv1d_kernel_size": 4, "gradient_recurrent_cut": True}
        config["slstm_block"] = {"slstm": cell, "feedforward": {"proj_factor": 1.3, "act_fn": "gelu"}}
    return config


@pytest.mark.parametrize("layout", ["vanilla", "cuda"])
@pytest.mark.parametrize("form", ["directory", "safetensors", "pt", "nested_pt", "wrapped"])
def test_block_stack(tmp_path: Path, golden, forge, rel_error, layout: str, form: str) -> None:
    """With a configuration file or from the tensors alone."""
    case, tensors = golden("block_stack_mixed_e32")
    parameters = forge.parameters_of(tensors)
    if layout == "cuda":
        parameters = forge.cuda_slstm(parameters)
    path = tmp_path / "m"
    if form == "directory":
        forge.write_reference(path, _stack_config(case), parameters)
    elif form == "wrapped":
        path = tmp_path / "m.safetensors"
        save_file({f"module._orig_mod.{n}": t for n, t in parameters.items()}, path)
    elif form == "safetensors":
        path = tmp_path / "m.safetensors"
        save_file(parameters, path)
    else:
        path = tmp_path / "m.pt"
        content = {"state_dict": parameters, "step": 3} if form == "nested_pt" else parameters
        torch.save(content, path)
    model, tokenizer = openxlstm.load_pretrained(path)
    assert type(model) is xLSTMBlockStack
    assert tokenizer is None
    assert rel_error(output(model, tensors["in.x"]), tensors["f32.y"]) < 3e-4


def test_block_stack_with_biases(tmp_path: Path, golden, forge, rel_error) -> None:
    _, tensors = golden("block_stack_mlstm_bias_e32")
    save_file(forge.parameters_of(tensors), tmp_path / "m.safetensors")
    model, _ = openxlstm.load_pretrained(tmp_path / "m.safetensors")
    assert model.config.bias
    assert rel_error(output(model, tensors["in.x"]), tensors["f32.y"]) < 3e-4


@pytest.mark.parametrize("layout", ["vanilla", "cuda"])
@pytest.mark.parametrize("configured", [True, False])
def test_language_model(tmp_path: Path, golden, forge, rel_error, layout: str, configured: bool) -> None:
    case, tensors = golden("lm_mixed_e32_v40")
    parameters = forge.parameters_of(tensors)
    if layout == "cuda":
        parameters = forge.cuda_slstm(parameters)
    config = _stack_config(case) | {
        "vocab_size": 40,
        "tie_weights": False,
        "weight_decay_on_embedding": False,
    }
    forge.write_reference(tmp_path / "m", {"model": config, "training": {"lr": 0.1}}, parameters)
    byte_tokenizer().save(tmp_path / "m")
    if not configured:
        (tmp_path / "m" / "config.yaml").unlink()
    model, tokenizer = openxlstm.load_pretrained(tmp_path / "m")
    assert type(model) is xLSTMLMModel
    assert tokenizer is not None
    x = tensors["in.idx"][:, :8]
    assert rel_error(output(model, x), tensors["f32.logits"]) < 3e-4
    assert rel_error(output(model.double(), x), tensors["f64.logits"]) < 2e-6


# ------------------------------------------------------------------ tokenizers, dtypes, the hub


def test_published_models_get_their_first_token(tmp_path: Path, forge) -> None:
    """Even where the tokenizer's own files say not to add it, as those of GPT-NeoX do."""
    tensors = forge.random_tensors(
        forge.large_shapes(64, 1, 2, 32, 64, 192, 300, "backbone.embeddings.weight")
    )
    fields = {"embedding_dim": 64, "num_blocks": 1, "num_heads": 2, "vocab_size": 300}
    forge.write_hf(tmp_path / "m", forge.old_config | fields, tensors)
    tokenizer = byte_tokenizer()
    tokenizer.add_bos = False
    tokenizer.save(tmp_path / "m")
    _, loaded = openxlstm.load_pretrained(tmp_path / "m")
    assert loaded is not None
    assert loaded.encode("a")[0] == 0
    assert loaded.eos_id == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float64", "fp16"])
def test_dtype(tmp_path: Path, forge, dtype: Any) -> None:
    tensors = forge.random_tensors(forge.large_shapes(64, 1, 2, 32, 64, 192, 30, "embedding.weight"))
    save_file(tensors, tmp_path / "m.safetensors")
    model, _ = openxlstm.load_pretrained(tmp_path / "m.safetensors", dtype=dtype, device="cpu")
    expected = {"float64": torch.float64, "fp16": torch.float16}.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    weight = model.backbone.blocks[0].ffn.proj_down.weight
    assert torch.equal(weight, tensors["backbone.blocks.0.ffn.proj_down.weight"].to(expected))
    assert all(p.requires_grad for p in model.parameters())


def test_training_a_loaded_model_leaves_the_file_alone(tmp_path: Path, forge) -> None:
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model, _ = openxlstm.load_pretrained(tmp_path / "m")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    openxlstm.save_pretrained(model, tmp_path / "m")  # over the file that is still mapped
    again, _ = openxlstm.load_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before


def test_loading_draws_no_random_numbers(tmp_path: Path, forge) -> None:
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "m")
    before = torch.get_rng_state()
    openxlstm.load_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


def test_hub(tmp_path: Path, forge, monkeypatch: pytest.MonkeyPatch) -> None:
    openxlstm.save_pretrained(forge.random_large(), tmp_path / "hub" / "small", tokenizer=byte_tokenizer())
    shutil.copytree(tmp_path / "hub" / "small", tmp_path / "hub" / "bare")
    (tmp_path / "hub" / "bare" / "tokenizer.json").unlink()
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        if repository == "NX-AI/xLSTM-7b":
            return str(tmp_path / "hub" / "small")
        if repository.startswith("NX-AI/"):
            return str(tmp_path / "hub")
        raise ConnectionError("offline\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = openxlstm.load_pretrained("NX-AI/scaling_laws/bare@main")
    assert model.vocab_size == 50
    assert tokenizer is not None
    assert tokenizer.encode("")[0] == 0
    assert asked[0] == ("NX-AI/scaling_laws", "main", ["bare/*.json", "bare/*.safetensors", "bare/*.yaml"])
    assert asked[1][0] == "NX-AI/xLSTM-7b"
    with pytest.raises(FileNotFoundError, match=r"neither a path here nor available .* hub: offline$"):
        openxlstm.load_pretrained("someone/something")
    with pytest.raises(FileNotFoundError, match="has no folder 'missing'"):
        openxlstm.load_pretrained("NX-AI/scaling_laws/missing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        openxlstm.load_pretrained("no-such-directory")


def test_yaml_is_read_as_people_write_it(tmp_path: Path, forge) -> None:
    """YAML 1.1 takes 1e-6 for a string."""
    shapes = forge.large_shapes(64, 1, 2, 32, 64, 192, 30, "embedding.weight")
    fields = {"embedding_dim": 64, "num_blocks": 1, "num_heads": 2, "vocab_size": 30}
    forge.write_reference(tmp_path / "m", fields, forge.random_tensors(shapes))
    text = yaml.safe_dump(fields) + "norm_eps: 1e-5\n"
    (tmp_path / "m" / "config.yaml").write_text(text)
    assert openxlstm.load_pretrained(tmp_path / "m")[0].config.norm_eps == 1e-5
