"""The demo in small: everything it prints and writes, on a tiny corpus."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from openxlstm.cli import demo
from openxlstm.cli.recipe import read_recipe


def test_small_demo(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", {**demo.MODEL, "embedding_dim": 32, "num_blocks": 2})
    monkeypatch.setattr(demo, "VOCABULARY", 300)
    monkeypatch.setattr(demo, "HELD_OUT", 0.2)
    monkeypatch.setattr(demo, "DATA", {"context_length": 32, "validation_context_length": 64})
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(20):
        (corpus / f"{n}.py").write_text(
            "".join(f"def function_{k}(x):\n    return x + {n}\n" for k in range(12))
        )
    output = tmp_path / "run"
    code, out, _ = cli("demo", "--steps", "5", "--output", output, "--corpus", corpus)
    assert code == 0
    for word in ("gzip -9", "xz -9", "byte 5-gram", "next:", "openxlstm generate", "openxlstm train"):
        assert word in out
    assert re.search(r"the model needs \d\.\d{3} bits per byte", out)
    assert re.search(r"done in \d+ min \d+ s", out)
    for name in ("model/model.safetensors", "model/tokenizer.json", "loss.png", "recipe.yaml", "log.jsonl"):
        assert (output / name).is_file(), name
    assert cli("train", output / "recipe.yaml", "--resume", "--train.steps", "6").code == 0


def test_directories_are_not_overwritten(tmp_path: Path) -> None:
    assert demo._free_directory(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo._free_directory(tmp_path / "demo") == tmp_path / "demo-2"


def test_verdict_names_every_baseline() -> None:
    text = demo.verdict(1.8, {"gzip -9": 2.0, "xz -9": 1.7})
    assert "better than gzip -9 (2.000)" in text
    assert "not yet better than xz -9 (1.700)" in text


def test_the_recipe_of_the_demo_is_the_demo() -> None:
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml")
    assert recipe.model == demo.MODEL
    assert recipe.train.steps == demo.STEPS
    assert recipe.data.context_length == demo.DATA["context_length"]
    assert recipe.train.learning_rate == demo.TRAIN["learning_rate"]


def test_an_existing_run_is_left_alone(mistake: Callable, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_00000005").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "already holds a run" in mistake("demo", "--output", tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert not (tmp_path / "data").exists()


def test_no_steps(mistake: Callable) -> None:
    assert "--steps" in mistake("demo", "--steps", "0", code=[2])


@pytest.mark.slow
def test_the_demo_keeps_its_promise(cli: Callable, tmp_path: Path) -> None:
    """The real thing: beats gzip -9 and the byte 5-gram."""
    code, out, _ = cli("demo", "--output", tmp_path / "run")
    assert code == 0
    better = re.search(r"better than (.*)", out)
    assert better
    beaten = better[1].split("; not yet")[0]
    assert "gzip -9" in beaten
    assert "byte 5-gram" in beaten
