"""Commands that succeed: data, train, resume, generate, chat, convert, inspect, doctor."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openxlstm import load_pretrained
from openxlstm.cli.recipe import make_recipe, read_recipe, take_overrides
from openxlstm.training import read_log


def test_data(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"this is text number {n}. " * 5)
    words = ("data", tmp_path / "texts", "--output", tmp_path / "out", "--vocab-size", "300")
    code, out, _ = cli(*words)
    assert code == 0
    assert "bytes/token" in out
    again = cli(*words)
    assert again.code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_data_from_json_lines(cli: Callable, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": f"text number {n}"}) + "\n" for n in range(9))
    (tmp_path / "a.jsonl").write_text(lines)
    words = ("--text-field", "body", "--tokenizer", "bytes", "--validation-fraction", "0.3")
    assert cli("data", tmp_path / "a.jsonl", "--output", tmp_path / "out", *words).code == 0


def test_data_from_a_small_file(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("It was a dark and stormy night.\n" * 10)
    words = ("--output", tmp_path / "out", "--tokenizer", "bytes")
    assert cli("data", tmp_path / "tiny.txt", *words).code == 0


def test_train_resume_and_use(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, _ = cli("train", recipe, "--train.steps", "3", "--train.seed=4")
    assert code == 0
    assert "trained 3 steps" in out
    assert "bits per byte" in out
    for name in ("recipe.yaml", "log.jsonl", "model/config.json", "model/tokenizer.json", "loss.png"):
        assert (run / name).is_file(), name
    written = read_recipe(run / "recipe.yaml")
    assert (written.train.steps, written.train.seed, written.model["vocab_size"]) == (3, 4, 257)

    assert "trained 5 steps" in cli("train", run / "recipe.yaml", "--resume", "--train.steps", "5").out
    out = cli("generate", run / "model", "the ", "--max-new-tokens", "4", "--temperature", "0").out
    assert out.startswith("the ")


def test_resumed_training_equals_uninterrupted_training(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    options = ("--train.schedule", "constant", "--train.warmup-steps", "0")
    for output, steps in (("whole", "4"), ("parts", "2")):
        assert (
            cli("train", recipe, *options, "--train.steps", steps, "--train.output", tmp_path / output).code
            == 0
        )
    assert cli("train", tmp_path / "parts/recipe.yaml", "--resume", "--train.steps", "4").code == 0
    whole, parts = (load_pretrained(tmp_path / name / "model")[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_check_trains_nothing(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    code, out, _ = cli("train", recipe, "--check")
    assert code == 0
    assert "parameters" in out
    assert not (tmp_path / "run").exists()


def test_overrides() -> None:
    rest, overrides = take_overrides(
        ["r.yaml", "--train.batch-size", "4", "--model.slstm_at=[1]", "--resume", "--train.no-progress",
         "--train.compile", "--train.tensorboard", "false"]
    )  # fmt: skip
    assert rest == ["r.yaml", "--resume"]
    assert overrides == {
        "train.batch_size": "4",
        "model.slstm_at": "[1]",
        "train.progress": "false",
        "train.compile": "true",
        "train.tensorboard": "false",
    }
    recipe = make_recipe({"model": {"model_type": "xlstm_lm", "num_blocks": 2}}, overrides)
    assert recipe.train.batch_size == 4
    assert recipe.model["slstm_at"] == [1]
    assert not recipe.train.progress


def test_recipe_round_trip(recipe: Path, tmp_path: Path) -> None:
    first = read_recipe(recipe, {"train.learning_rate": "3e-4", "prompts": "[a, b]"})
    first.write(tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == first


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_readable_and_can_be_inspected(cli: Callable, path: Path) -> None:
    assert read_recipe(path).train.steps > 0
    assert "parameters" in cli("inspect", path).out


def test_generation_is_reproducible(cli: Callable, model: Path) -> None:
    words = ("generate", model, "ab", "--max-new-tokens", "8", "--seed", "3")
    assert cli(*words) == cli(*words)
    assert not cli(*words, "--only-new").out.startswith("ab")


def test_generation_from_standard_input(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert cli("generate", model, "-", "--max-new-tokens", "3").out.startswith("piped")


def test_state_is_remembered(cli: Callable, model: Path, tmp_path: Path) -> None:
    state, options = tmp_path / "a.state", ("--temperature", "0", "--only-new")
    whole = cli("generate", model, "ab", "--max-new-tokens", "12", *options).out
    first = cli("generate", model, "ab", "--max-new-tokens", "5", "--state-out", state, *options).out
    second = cli("generate", model, "--state-in", state, "--max-new-tokens", "7", *options).out
    assert first.removesuffix("\n") + second == whole


def test_batches(cli: Callable, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nlonger prompt\n\nab\n")
    options = ("--max-new-tokens", "6", "--temperature", "0")
    code, out, _ = cli("generate", model, "--prompts", tmp_path / "prompts.txt", *options)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer["prompt"] for answer in answers] == ["a", "longer prompt", "ab"]
    alone = cli("generate", model, "longer prompt", "--only-new", *options).out
    assert answers[1]["text"] + "\n" == alone
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    code, out, _ = cli("generate", model, "--prompts", tmp_path / "prompts.jsonl", *options)
    assert json.loads(out) == answers[2]
    (tmp_path / "odd.txt").write_text("a\u2028b\x0cc\n")
    out = cli("generate", model, "--prompts", tmp_path / "odd.txt", *options).out
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["a\u2028b\x0cc"]


def test_chat(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/help\n/nonsense\n/quit\n"))
    code, out, err = cli("chat", model, "--max-new-tokens", "5", "--seed", "0")
    assert (code, err) == (0, "")
    assert "/undo" in out
    assert "unknown command '/nonsense'" in out


def test_convert_there_and_back(cli: Callable, model: Path, tmp_path: Path) -> None:
    reference, back = tmp_path / "reference", tmp_path / "back"
    assert cli("convert", model, reference, "--to", "reference", "--weight-mode", "fused").code == 0
    code, out, _ = cli("convert", reference, back, "--to", "huggingface")
    assert code == 0
    assert "model.safetensors" in out
    first, second = load_pretrained(model)[0].state_dict(), load_pretrained(back)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inspect(cli: Callable, model: Path) -> None:
    code, out, _ = cli("inspect", model)
    assert code == 0
    assert "xlstm_large" in out
    assert "embedding_dim" in out


def test_doctor(cli: Callable) -> None:
    code, out, _ = cli("doctor", "--no-measure")
    assert code == 0
    assert "chosen by 'auto'" in out
    report = json.loads(cli("doctor", "--json").out)
    assert report["peak_gflops_float32"] > 0
    assert report["bandwidth_gbytes"] > 0


def test_interruption_saves_and_says_how_to_resume(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "-m",
        "openxlstm.cli",
        "train",
        str(recipe),
        "--train.steps",
        "100000",
        "--train.validation-every",
        "0",
    ]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "log.jsonl").is_file() and (run / "log.jsonl").read_text().count('"train"') > 3:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    again = f"openxlstm train {run}/recipe.yaml --resume"
    assert f"resume with `{again}`" in err
    done = int(re.search(r"stopped after step (\d+)", err)[1])  # type: ignore[index]
    assert f"trained {done + 1} steps" in cli(*again.split()[1:], "--train.steps", str(done + 1)).out


def test_same_seed_same_curve(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    curves = []
    for name in ("first", "second"):
        assert cli("train", recipe, "--train.steps", "4", "--train.output", tmp_path / name).code == 0
        records = read_log(tmp_path / name / "log.jsonl")
        curves.append([(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r])
    assert curves[0] == curves[1]
    assert len(curves[0]) >= 5
