"""``openxlstm train``: what the run directory holds, and resuming from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from openxlstm.cli.recipe import read_recipe
from openxlstm.training import TrainingInterrupted
from openxlstm.training.trainer import Trainer


def test_overrides_of_a_resumed_run_are_kept(
    cli: Callable, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert cli("train", recipe).code == 0

    def interrupt(self: Trainer) -> None:
        raise TrainingInterrupted("stopped", self.step, run)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupt)
        assert cli("train", run / "recipe.yaml", "--resume", "--train.steps", "4").code == 130
    assert "trained 4 steps" in cli("train", run / "recipe.yaml", "--resume").out


def test_a_refused_resumption_changes_nothing(mistake: Callable, cli: Callable, recipe: Path) -> None:
    assert cli("train", recipe).code == 0
    written = (recipe.parent / "run/recipe.yaml").read_text()
    assert mistake("train", recipe.parent / "run/recipe.yaml", "--resume", "--train.seed", "7")
    assert (recipe.parent / "run/recipe.yaml").read_text() == written


def test_a_run_that_moved(
    cli: Callable, recipe: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    words = ("--data.path", shards.name, "--train.output", tmp_path / "run")
    assert cli("train", recipe, *words).code == 0
    assert read_recipe(tmp_path / "run/recipe.yaml").data.path == shards
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert "trained 3 steps" in cli("train", "recipe.yaml", "--resume", "--train.steps", "3").out
    assert (tmp_path / "copy/checkpoints/step_00000003").is_dir()
    assert not (tmp_path / "run/checkpoints/step_00000003").exists()


def test_nothing_to_resume(mistake: Callable, recipe: Path, tmp_path: Path) -> None:
    assert f"'{tmp_path / 'run'}' holds no checkpoint" in mistake("train", recipe, "--resume")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gone", [("checkpoints",), ("checkpoints", "model")])
def test_a_run_without_checkpoints_is_not_overwritten(
    cli: Callable, mistake: Callable, recipe: Path, tmp_path: Path, gone: tuple[str, ...]
) -> None:
    assert cli("train", recipe).code == 0
    for name in gone:
        shutil.rmtree(tmp_path / "run" / name)
    log = (tmp_path / "run/log.jsonl").read_text()
    assert "already holds the log" in mistake("train", recipe)
    assert (tmp_path / "run/log.jsonl").read_text() == log


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_an_unknown_backend_leaves_nothing(
    mistake: Callable, recipe: Path, tmp_path: Path, check: tuple[str, ...]
) -> None:
    backend = ("--model.mlstm_block.mlstm.ops_backend", "chunkwize")
    assert "unknown backend" in mistake("train", recipe, *backend, *check)
    assert not (tmp_path / "run").exists()


def test_vocabulary_from_the_data(cli: Callable, recipe: Path) -> None:
    assert cli("train", recipe, "--model.vocab_size", "null", "--check").code == 0


def test_fields_are_named_with_their_section(mistake: Callable, recipe: Path) -> None:
    assert "'model.embeding_dim'" in mistake("train", recipe, "--model.embeding_dim", "3", code=[2])
    values = yaml.safe_load(recipe.read_text())
    values["model"]["model_type"] = "nothing"
    recipe.write_text(yaml.safe_dump(values))
    assert "model.model_type must be" in mistake("train", recipe, code=[2])


def test_a_ratio_that_yaml_reads_as_a_number(mistake: Callable, recipe: Path) -> None:
    line = mistake("train", recipe, "--model.slstm_at", "7:1", code=[2])
    assert "reads 7:1 as 421" in line
    assert "quote it" in line
