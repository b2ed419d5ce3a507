"""Quantised checkpoints: round trips, memory maps, options, damaged and foreign files, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openxlstm
from openxlstm.checkpoint import quantize_checkpoint, read_checkpoint, train_bpe
from openxlstm.cli.main import main
from openxlstm.layers.quantized import Quantization, QuantizedLinear
from openxlstm.models import build_model

TEXTS = ["def main():\n    pass\n", "class Parser:\n    x = 1\n"]
STACK = {"model_type": "xlstm_lm", "embedding_dim": 48, "num_blocks": 2, "vocab_size": 257, "slstm_at": [1]}
LARGE = {
    "model_type": "xlstm_large", "embedding_dim": 80, "num_heads": 2, "num_blocks": 2, "vocab_size": 257,
}  # fmt: skip
MODELS = {
    "stack": STACK,
    "tied-stack": {**STACK, "tie_weights": True},
    "large": LARGE,
    "fused-large": {**LARGE, "weight_mode": "fused", "use_bias": True, "tie_word_embeddings": True},
}


@pytest.fixture
def source(tmp_path):
    """Makes the checkpoint of one of the models."""

    def make(kind="stack", **fields):
        model = build_model({**MODELS[kind], **fields}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        directory = tmp_path / kind
        openxlstm.save_pretrained(model, directory, tokenizer=train_bpe(TEXTS, 257), layout="openxlstm")
        return directory

    return make


def copied(directory):
    """The tensors of a checkpoint, to be changed; its file is gone, for it may still be mapped."""
    weights = {n: t.clone() for n, t in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    return weights


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "group": 64, "head_bits": 16}], ids=str)
def test_round_trip(source, tmp_path, rel_error, kind, options):
    path = source(kind)
    model, _ = openxlstm.load_pretrained(path)
    quantize_checkpoint(path, tmp_path / "q", Quantization(**options))
    quantized, tokenizer = openxlstm.load_pretrained(tmp_path / "q")
    assert tokenizer is not None
    assert tokenizer.encode("main") == train_bpe(TEXTS, 257).encode("main")
    tokens = torch.randint(0, 257, (2, 12))
    with torch.inference_mode():
        expected, logits = model(tokens), quantized(tokens)
    assert 0 < rel_error(logits, expected) < (0.5 if "bits" in options else 0.05)
    maps = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    assert (quantized.lm_head in maps) == ("head_bits" not in options)
    # in memory, saved again, and loaded again: the same numbers
    openxlstm.save_pretrained(quantized, tmp_path / "again", tokenizer=tokenizer)
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "q/config.json").read_text()
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("q", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    # another dtype: everything but the packed maps
    half, _ = openxlstm.load_pretrained(tmp_path / "q", dtype="bfloat16")
    assert half.backbone if kind.endswith("large") else half.xlstm_block_stack
    for a, b in zip(maps, (m for m in half.modules() if isinstance(m, QuantizedLinear)), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.scales, b.scales)


def test_generation_and_sessions(source, tmp_path):
    quantize_checkpoint(source(), tmp_path / "q", Quantization(bits=4))
    generator = openxlstm.Generator(*openxlstm.load_pretrained(tmp_path / "q"))
    text = generator.generate("def main(", max_new_tokens=8, temperature=0)
    session = generator.start("def main(", temperature=0)
    assert session.generate(max_new_tokens=8) == text
    assert generator.generate(["def main(", "class"], max_new_tokens=8, temperature=0)[0] == text


def test_sharded_and_converted(source, tmp_path):
    path = source("large")
    quantize_checkpoint(path, tmp_path / "q", Quantization(bits=4), dtype="bfloat16", max_shard_bytes=20_000)
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) >= 2
    model, _ = openxlstm.load_pretrained(tmp_path / "q")
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.lm_head.scales.dtype == torch.bfloat16
    openxlstm.checkpoint.convert(tmp_path / "q", tmp_path / "one", to="openxlstm", dtype="float32")
    whole, _ = openxlstm.load_pretrained(tmp_path / "one")
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)
    for layout in ("huggingface", "reference"):
        with pytest.raises(ValueError, match="quantised models exist only in the openxlstm layout"):
            openxlstm.checkpoint.convert(tmp_path / "q", tmp_path / "no", to=layout)


def test_importance_uses_the_text(source, tmp_path):
    path = source("fused-large")
    seen = []
    schemes = (Quantization(4), "a"), (Quantization(4, method="importance"), "b")
    for quantization, name in schemes:
        quantize_checkpoint(
            path,
            tmp_path / name,
            quantization,
            calibration=iter(TEXTS * 20),
            on_matrix=lambda done, total: seen.append((done, total)),
        )
    count = 2 * 8 + 1
    assert seen == [(n, count) for n in range(1, count + 1)] * 2
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert any(not torch.equal(a[n], b[n]) for n in a if n.endswith(".scales"))


def test_the_file_is_mapped_not_copied(tmp_path, source):
    """Loading costs next to no memory until the codes are read, and none beside the map after."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc, which this system lacks")
    model = build_model({**LARGE, "embedding_dim": 1024, "num_heads": 4, "num_blocks": 4})
    openxlstm.save_pretrained(model, tmp_path / "m", layout="openxlstm")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", Quantization(method="plain"))
    quantize_checkpoint(source("large"), tmp_path / "small", Quantization(method="plain"))
    del model
    program = """
        import sys, torch, openxlstm

        def memory(kind):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(x.split()[1]) for x in lines if x.startswith(kind)) / 1024

        def load(path):
            model, _ = openxlstm.load_pretrained(path)
            loaded = memory("VmRSS")
            with torch.inference_mode():
                model.step(torch.tensor([[1]]))
            return model, loaded

        small, _ = load(sys.argv[1])  # imports and first calls cost memory too
        resident, private = memory("VmRSS"), memory("RssAnon")
        model, loaded = load(sys.argv[2])
        print(loaded - resident, memory("RssAnon") - private)
    """
    arguments = [str(tmp_path / "small"), str(tmp_path / "q")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded, private = map(float, result.stdout.split())
    size = (tmp_path / "q/model.safetensors").stat().st_size / 2**20
    assert size > 45
    assert loaded < 0.2 * size, (loaded, size)
    assert private < 0.2 * size, (private, size)  # the step's state and working space


def test_damaged_and_foreign_files(source, tmp_path):
    quantize_checkpoint(source(), tmp_path / "q", Quantization(bits=4))
    config = json.loads((tmp_path / "q/config.json").read_text())
    assert config["quantization"]["format"] == 1

    def refuses(message, **section):
        values = {**config, "quantization": {**config["quantization"], **section}}
        (tmp_path / "q/config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message) as caught:
            openxlstm.load_pretrained(tmp_path / "q")
        assert "\n" not in str(caught.value)

    refuses(r"'.*q' is quantised in format 2, this version reads format 1", format=2)
    refuses(r"in a way this version does not know: bits must be 8 or 4, got 2", bits=2)
    refuses(r"unknown field 'quantization.sparsity'", sparsity=0.5)
    refuses(r"has shape \(\d+, \d+\), expected", group=64)
    refuses(r"has shape \(\d+, \d+\), expected", bits=8)
    refuses(r"holds tensor 'lm_head.scales'", head_bits=16)
    other = {**config, "embedding_dim": 64}  # another model's file
    (tmp_path / "q/config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"tensor '.*' in '.*' has shape .* expected"):
        openxlstm.load_pretrained(tmp_path / "q")
    without = {name: value for name, value in config.items() if name != "quantization"}
    (tmp_path / "q/config.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match=r"holds tensor '.*\.scales'"):
        openxlstm.load_pretrained(tmp_path / "q")

    (tmp_path / "q/config.json").write_text(json.dumps(config))
    weights = copied(tmp_path / "q")
    weights["lm_head.scales"] = weights["lm_head.scales"].float()
    save_file(weights, tmp_path / "q/model.safetensors")
    with pytest.raises(ValueError, match=r"'lm_head.scales' .* has type float32, expected bfloat16"):
        openxlstm.load_pretrained(tmp_path / "q")
    whole = (tmp_path / "q/model.safetensors").read_bytes()
    (tmp_path / "q/model.safetensors").unlink()
    (tmp_path / "q/model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        openxlstm.load_pretrained(tmp_path / "q")


def test_what_cannot_be_quantised(source, tmp_path):
    path = source()
    quantize_checkpoint(path, tmp_path / "q", Quantization())
    with pytest.raises(ValueError, match="is quantised already; quantise the original"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "r", Quantization())
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="needs calibration text; there was none"):
            quantize_checkpoint(path, tmp_path / "r", Quantization(method="importance"), calibration=texts)
    os.remove(path / "tokenizer.json")
    with pytest.raises(ValueError, match="needs a language model with a tokenizer"):
        quantize_checkpoint(path, tmp_path / "r", Quantization(method="importance"), calibration=TEXTS)
    weights = copied(path)
    weights["lm_head.weight"][0, 0] = torch.inf
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'lm_head.weight' holds NaN or infinite numbers"):
        quantize_checkpoint(path, tmp_path / "r", Quantization())
    assert not (tmp_path / "r").exists()
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_command(source, tmp_path, capsys):
    path, text = source("large"), tmp_path / "text.txt"
    text.write_text("def main():\n    pass\n" * 50)
    target = str(tmp_path / "int4")
    words = ["quantize", str(path), target, "--bits", "4", "--method", "importance"]
    assert main([*words, "--calibration", str(text), "--head-bits", "8"]) == 0
    assert "MiB" in capsys.readouterr().out
    assert read_checkpoint(Path(target)).quantization == Quantization(4, method="importance", head_bits=8)
    assert main(["inspect", target]) == 0
    assert "quantised: bits=4, group=32, method=importance, head_bits=8" in capsys.readouterr().out
    assert main(["generate", target, "def", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([str(path), target], "holds a checkpoint; choose a new directory, or give --overwrite"),
        ([str(path), str(tmp_path / "x"), "--method", "importance"], "--calibration TEXT go together"),
        ([str(path), str(tmp_path / "x"), "--calibration", str(text)], "--calibration TEXT go together"),
        ([str(path), str(tmp_path / "x"), "--bits", "3"], "invalid choice"),
        ([str(tmp_path / "none"), str(tmp_path / "x")], "does not exist"),
    ):
        assert main(["quantize", *arguments]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1
    assert main(["quantize", str(path), target, "--overwrite"]) == 0
    assert read_checkpoint(Path(target)).quantization == Quantization(8)
