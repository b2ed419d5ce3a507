"""What users get wrong: each case is one clear line, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def test_missing_corpus(mistake: Callable, tmp_path: Path) -> None:
    line = mistake("data", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert "nowhere" in line
    assert not (tmp_path / "out").exists()


def test_empty_corpus(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    line = mistake("data", tmp_path / "texts", "--output", tmp_path / "out")
    assert "the corpus is empty" in line
    assert not (tmp_path / "out").exists()


def test_no_source_and_no_output(mistake: Callable, tmp_path: Path) -> None:
    assert "--standard-library" in mistake("data", "--output", tmp_path / "out")
    assert "--output" in mistake("data", tmp_path)


def test_missing_tokenizer(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = mistake("data", tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", tmp_path / "none")
    assert "tokenizer" in line


def test_missing_data(mistake: Callable, recipe: Path, tmp_path: Path) -> None:
    assert "nowhere" in mistake("train", recipe, "--data.path", tmp_path / "nowhere")
    assert "`openxlstm data`" in mistake("train", recipe, "--data.path", "null")
    assert not (tmp_path / "run").exists()


def test_missing_recipe(mistake: Callable, tmp_path: Path) -> None:
    assert "does not exist" in mistake("train", tmp_path / "no.yaml")


def test_recipe_that_is_not_yaml(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "not a valid configuration file" in mistake("train", tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("name", "value", "suggestion"),
    [
        ("train.step", "3", "train.steps"),
        ("train.learning-rat", "1e-3", "train.learning_rate"),
        ("trian.steps", "3", "train"),
        ("model.embeding_dim", "32", "model.embedding_dim"),
        ("model.mlstm_block.mlstm.num_head", "2", "model.mlstm_block.mlstm.num_heads"),
        ("data.context_len", "8", "data.context_length"),
        ("model.model_type", "xlstm_larg", "xlstm_large"),
    ],
)
def test_unknown_field(mistake: Callable, recipe: Path, name: str, value: str, suggestion: str) -> None:
    assert f"Did you mean '{suggestion}'?" in mistake("train", recipe, f"--{name}", value, code=[2])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("train.steps", "many", "train.steps must be int"),
        ("train.steps", "0", "at least 1"),
        ("train.schedule", "cosin", "cosine"),
        ("train.learning_rate", "-1", "positive"),
        ("model.slstm_at", "[7]", "positions 0 to 1"),
        ("model.vocab_size", "100", "token id"),
        ("data.context_length", "100000", "context_length"),
        ("train.device", "gpu", "unknown device"),
    ],
)
def test_impossible_value(mistake: Callable, recipe: Path, name: str, value: str, text: str) -> None:
    assert text in mistake("train", recipe, f"--{name}", value, code=[2])


def test_override_without_value(mistake: Callable, recipe: Path) -> None:
    assert "needs a value" in mistake("train", recipe, "--train.steps")


def test_heads_that_do_not_divide_the_width(mistake: Callable, recipe: Path) -> None:
    line = mistake("train", recipe, "--model.mlstm_block.mlstm.num_heads", "7", code=[2])
    assert "7" in line
    assert "divide" in line


def test_unknown_backend(mistake: Callable, recipe: Path) -> None:
    line = mistake("train", recipe, "--model.mlstm_block.mlstm.ops_backend", "chunkwize", code=[2])
    assert "unknown backend 'chunkwize'" in line
    assert "chunkwise" in line


def test_diverging_training(mistake: Callable, recipe: Path) -> None:
    wild = ("--train.learning-rate", "1e30", "--train.clip", "0", "--train.steps", "9")
    line = mistake("train", recipe, *wild, "--train.checkpoint-every", "1", code=[1])
    assert "training stopped before the update" in line
    assert "the last good checkpoint is" in line


def test_run_that_exists(cli: Callable, mistake: Callable, recipe: Path) -> None:
    assert cli("train", recipe).code == 0
    assert "already holds a run" in mistake("train", recipe)


def test_missing_checkpoint(mistake: Callable, tmp_path: Path) -> None:
    assert "does not exist" in mistake("generate", tmp_path / "nowhere", "x", code=[1])
    assert "nowhere" in mistake("convert", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_truncated_checkpoint(mistake: Callable, model: Path, tmp_path: Path) -> None:
    copy = copy_of(model, tmp_path / "copy")
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert weights.name in mistake("generate", copy, "x")
    assert mistake("convert", copy, tmp_path / "out", "--to", "reference")
    assert not (tmp_path / "out").exists()


def test_foreign_checkpoint(mistake: Callable, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, foreign / "model.safetensors")
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    assert "foreign" in mistake("generate", foreign, "x")


def test_damaged_tokenizer(mistake: Callable, model: Path, tmp_path: Path) -> None:
    copy = copy_of(model, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer" in mistake("generate", copy, "x")


def test_token_id_out_of_range(mistake: Callable, shards: Path, recipe: Path) -> None:
    line = mistake("train", recipe, "--model.vocab_size", "50", code=[2])
    assert "vocab" in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--dtype", "float3"], "unknown dtype 'float3'"),
        (["--device", "tpu9"], "device"),
        (["--prompts", "nowhere.txt"], "--prompts goes with neither"),
    ],
)
def test_impossible_generation(mistake: Callable, model: Path, options: list[str], text: str) -> None:
    assert text in mistake("generate", model, "x", *options, code=[2])


def test_prompt_files(mistake: Callable, model: Path, tmp_path: Path) -> None:
    assert "does not exist" in mistake("generate", model, "--prompts", tmp_path / "no.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompts" in mistake("generate", model, "--prompts", tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in mistake("generate", model, "--prompts", tmp_path / "bad.jsonl")
    (tmp_path / "number.jsonl").write_text('\n{"prompt": [1]}\n{"prompt": 5}\n')
    line = mistake("generate", model, "--prompts", tmp_path / "number.jsonl", code=[2])
    assert "number.jsonl' line 3" in line
    assert "got 5" in line
    (tmp_path / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    assert "latin.txt' is not UTF-8" in mistake("generate", model, "--prompts", tmp_path / "latin.txt")


def test_recipe_that_is_not_utf8(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: na\u00efve".encode("latin-1"))
    assert "latin.yaml' is not UTF-8" in mistake("train", tmp_path / "latin.yaml", code=[2])


def test_state_that_cannot_be_written(mistake: Callable, cli: Callable, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.state"
    assert f"there is no directory '{path.parent}'" in mistake("generate", model, "x", "--state-out", path)
    assert "is a directory" in mistake("generate", model, "x", "--state-out", tmp_path)
    assert cli("generate", model, "x", "--state-out", path).out == ""


def test_context_length_of_zero(mistake: Callable, model: Path) -> None:
    assert "at least 1, got 0" in mistake("inspect", model, "--context-length", "0", code=[2])


def test_converting_into_a_directory_in_use(cli: Callable, mistake: Callable, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert "holds other files and no checkpoint" in mistake("convert", model, out, "--overwrite", code=[2])
    (out / "thesis.tex").unlink()
    assert cli("convert", model, out, "--to", "reference").code == 0
    (out / "notes.md").write_text("mine")
    assert "give --overwrite" in mistake("convert", model, out, code=[2])
    result = cli("convert", model, out, "--to", "reference", "--overwrite")
    assert result.code == 0
    assert "config.yaml, model.safetensors, tokenizer.json, tokenizer_config.json\n" in result.out
    assert "notes.md" not in result.out
    assert (out / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--workers", "0"], "workers must be at least 1"),
        (["--vocab-size", "9"], "--vocab-size must be at least 257"),
        (["--output", "TMP/used"], "already holds other files (thesis.tex)"),
        (["--output", "TMP/used/thesis.tex/out"], "is a file"),
        (["--output", "TMP/texts/out"], "lies inside the corpus"),
        (["--separator", "#"], "is a directory, whose files are the documents"),
    ],
)
def test_data_is_refused_before_the_work(
    mistake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    for name in ("texts/a.txt", "used/thesis.tex"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("some text\n")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the corpus was read")

    monkeypatch.setattr("openxlstm.cli.data.open_corpus", read)
    words = [word.replace("TMP", str(tmp_path)) for word in words]
    assert text in mistake("data", tmp_path / "texts", "--output", tmp_path / "out", *words)


def test_a_corpus_too_small_to_split(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a word")
    line = mistake("data", tmp_path / "a.txt", "--output", tmp_path / "out")
    assert "--validation-fraction 0" in line


def test_state_of_another_model(mistake: Callable, model: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.state")
    assert "not a saved" in mistake("generate", model, "--state-in", tmp_path / "x.state")
    assert "does not exist" in mistake("generate", model, "--state-in", tmp_path / "none.state")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk fails as it does on a full one."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_converting(mistake: Callable, model: Path, tmp_path: Path) -> None:
    assert "disk is full" in mistake("convert", model, tmp_path / "out", "--to", "reference", code=[1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_training(mistake: Callable, recipe: Path, tmp_path: Path) -> None:
    assert "disk is full" in mistake("train", recipe, code=[1])
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    assert left == []


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_preparing(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(9):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text number {n}")
    words = ("data", tmp_path / "texts", "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert "disk is full" in mistake(*words, code=[1])


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_saving_a_state(cli: Callable, model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "x", "--max-new-tokens", "2", "--state-out", tmp_path / "a.state")
    code, out, err = cli(*words)
    assert code == 1
    assert out.endswith("\n")  # the message starts on a line of its own
    assert f"disk is full ([Errno 28] No space left on device: '{tmp_path / 'a.state'}')" in err
    assert err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "nan", "1.5"])
def test_plan_checks_the_utilisation_without_devices(mistake: Callable, value: str) -> None:
    assert "utilisation must lie in (0, 1]" in mistake("plan", "--flops", "1e20", "--utilisation", value)


def test_a_missing_argument_is_named_with_its_meaning(mistake: Callable) -> None:
    assert "needs MODEL (checkpoint directory" in mistake("bench")


@pytest.mark.parametrize("value", ["0", "nan", "inf"])
def test_bench_wants_a_time_that_ends(mistake: Callable, value: str) -> None:
    assert "--seconds must be positive" in mistake("bench", "--model", "any", "--seconds", value)
