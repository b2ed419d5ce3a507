"""``openxlstm eval``: every evaluation on small settings, and its mistakes as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from openxlstm.cli.eval import EVALUATIONS

TINY = ("--steps", "2", "--batch-size", "2")


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_help_of_an_evaluation(cli: Callable, name: str) -> None:
    code, out, err = cli("eval", name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: openxlstm eval {name}")
    assert "examples:" in out


def test_listing(cli: Callable) -> None:
    out = cli("eval").out
    for name in EVALUATIONS:
        assert f"\n  {name} " in out
    out = cli("eval", "tasks").out
    for name in ("parity", "mqar-256", "slstm-no-recurrence", "mamba"):
        assert f"\n  {name} " in out


def test_one_task(cli: Callable, tmp_path: Path) -> None:
    words = ("eval", "task", "even-pairs", "--model", "lstm", "--width", "8", *TINY)
    result = cli(*words, "--test-lengths", "5", "9", "--output", tmp_path)
    assert result.code == 0
    assert "| lstm  |" in result.out
    assert "accuracy 5-9" in result.out


def test_comparison(cli: Callable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("eval", "compare", "--models", "slstm", "gru", "--tasks", "copying", "--parameters", "3000")
    words = (*words, *TINY, "--seeds", "2", "--processes", "1", "--output", str(tmp_path))
    result = cli(*words)
    assert result.code == 0, result.err
    assert "### copying: 2 steps, 2 seeds" in result.out
    assert (tmp_path / "report.html").is_file()
    assert "4 of 4 trials are done already" in cli(*words).err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["state-trakcing"], "unknown evaluation 'state-trakcing'. Did you mean 'state-tracking'?"),
        (["task", "parrity"], "unknown task 'parrity'. Did you mean 'parity'?"),
        (["task", "parity", "--model", "ltsm"], "unknown model 'ltsm'. Did you mean 'lstm'?"),
        (["task", "majority", "--train-lengths", "4", "4"], "no strings of length 4"),
        (["task", "parity", "--protocol", "first"], "has no protocol 'first'"),
        (["task", "parity", "--steps", "0"], "steps must be at least 1"),
        (["compare", "--seeds", "0"], "seeds must be at least 1"),
        (["compare", "--tasks", "sort"], "unknown task 'sort'"),
        (["compare", "--parameters", "10"], "too few"),
        (["state-tracking", "--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_mistakes(mistake: Callable, words: list[str], text: str) -> None:
    assert text in mistake("eval", *words, code=[2])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of some text\n" for n in range(40)))
    return path


def test_text(cli: Callable, model: Path, shards: Path, text: Path, tmp_path: Path) -> None:
    result = cli("eval", "text", model, text, "--output", tmp_path / "figures" / "a.json")
    assert result.code == 0, result.err
    assert " bits per byte    perplexity " in result.out
    assert "streamed" in result.out
    figures = json.loads((tmp_path / "figures" / "a.json").read_text())
    assert figures["bytes"] == figures["tokens"] == len(text.read_text())
    assert "windows of 32" in cli("eval", "text", model, text, "--window", "32").out
    assert "100 tokens" in cli("eval", "text", model, text, "--max-tokens", "100").out
    documents = int(cli("eval", "text", model, shards).out.split(" bytes, ")[1].split()[0])
    assert documents > 1
    assert "1 documents" in cli("eval", "text", model, shards, "--max-tokens", "9").out


def test_context(cli: Callable, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli(
        "eval", "context", model, text, "--length", "64", "--rows", "3", "--output", tmp_path / "out"
    )
    assert result.code == 0, result.err
    assert "effective context: " in result.out
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"context.json", "position.png", "past.png"}


def test_long_context(cli: Callable, model: Path, text: Path, tmp_path: Path) -> None:
    words = ("--tasks", "needle", "--lengths", "700", "--samples", "1", "--output", tmp_path / "long.json")
    result = cli("eval", "long-context", model, text, *words)
    assert result.code == 0, result.err
    assert "needle  " in result.out
    (found,) = json.loads((tmp_path / "long.json").read_text())
    assert abs(found["tokens"][0] - 700) <= 14


def test_a_model_from_end_to_end(cli: Callable, model: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--length", "64", "--lengths", "700", "--samples", "1", "--tokens", "40", "--output", tmp_path)
    result = cli("eval", "model", model, shards, *words)
    assert result.code == 0, result.err
    for part in (" bits per byte ", "effective context: ", "frequent-words  ", "half-life"):
        assert part in result.out
    assert {path.name for path in tmp_path.iterdir()} >= {
        "text.json",
        "context",
        "long_context.json",
        "inside",
    }


@pytest.mark.parametrize(
    ("words", "text_in_line"),
    [
        (["text", "MODEL", "TEXT", "--window", "100000"], "fewer than the window of 100000"),
        (["text", "MODEL", "TEXT", "--stride", "4"], "--stride goes with --window"),
        (["text", "MODEL", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["text", "nowhere", "TEXT"], "nowhere"),
        (["text", "MODEL", "TEXT", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["long-context", "MODEL", "TEXT", "--tasks", "needel"], "Did you mean 'needle'?"),
        (["long-context", "MODEL", "TEXT", "--lengths", "30"], "length 30 is too short for task 'needle'"),
        (["long-context", "MODEL", "TEXT", "--samples", "0"], "samples must be at least 1"),
        (["context", "MODEL", "TEXT", "--length", "5000"], "fewer than the 5000 that are needed"),
        (["context", "MODEL", "TEXT", "--length", "9"], "--length must be at least 64"),
    ],
)
def test_mistakes_about_texts(
    mistake: Callable, model: Path, text: Path, words: list[str], text_in_line: str
) -> None:
    names = {"MODEL": str(model), "TEXT": str(text)}
    assert text_in_line in mistake("eval", *(names.get(word, word) for word in words))


def test_inside(
    cli: Callable, mistake: Callable, model: Path, recipe: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    result = cli("inspect", model, "--text", text, "--tokens", "40", "--output", tmp_path / "inside")
    assert result.code == 0, result.err
    assert "half-life" in result.out
    figures = json.loads((tmp_path / "inside" / "inside.json").read_text())
    assert [head["head"] for head in figures["heads"]] == [0, 1]
    assert len(figures["tokens"]) == 41
    names = {path.name for path in (tmp_path / "inside").iterdir()}
    assert names == {"inside.json", "block0-forget.png", "block0-input.png", "block0-retrieval.png"}
    assert "is a recipe; give a checkpoint" in mistake("inspect", recipe, "--text", text)
    assert "--tokens must lie between" in mistake("inspect", model, "--text", text, "--tokens", "1")
