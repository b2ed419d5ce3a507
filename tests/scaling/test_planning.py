"""Plans: consistent options, laws from a file, warnings outside the fitted range."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from openxlstm.cli.main import main
from openxlstm.models import parameter_count
from openxlstm.models.accounting import find_device, training_flops_per_token
from openxlstm.scaling import bootstrap, fit_runs
from openxlstm.scaling.laws import law_of, read_laws, write_laws
from openxlstm.scaling.planning import budget_of, plan

H100 = find_device("h100")


@pytest.fixture(scope="module")
def laws() -> dict:
    return read_laws()[0]


def test_options_spend_the_budget(laws: dict) -> None:
    families = plan(1e20, laws, device=H100, gpus=8)
    assert set(families) == {"xlstm", "transformer"}
    for options in families.values():
        best, *smaller = options
        assert best.shrink == 1
        for option in options:
            assert option.num_params == parameter_count(option.config)
            spent = training_flops_per_token(option.config, 8192) * option.num_tokens
            assert spent == pytest.approx(1e20)
            assert option.interval[0] < option.loss < option.interval[1]
            assert option.interval[1] / option.interval[0] < 1.06
            assert option.seconds == pytest.approx(1e20 / (8 * H100.peak_flops * 0.4))
        for larger, option in zip(options, smaller, strict=False):
            assert option.loss > larger.loss  # over-training costs loss and saves inference
            assert option.num_params < larger.num_params
            assert option.step_seconds < larger.step_seconds
            assert option.inference_memory < larger.inference_memory
    xlstm, transformer = families["xlstm"][0], families["transformer"][0]
    assert xlstm.loss < transformer.loss
    assert xlstm.num_params > transformer.num_params  # as published
    assert xlstm.num_params == pytest.approx(1.07e9, rel=0.25)
    assert transformer.num_params == pytest.approx(7.18e8, rel=0.25)


def test_costs_of_inference_follow_the_context(laws: dict) -> None:
    short, long = (plan(1e20, laws, device=H100, context_length=c) for c in (8192, 32768))
    growth = {
        family: (long[family][0].state_memory / long[family][0].num_params)
        / (short[family][0].state_memory / short[family][0].num_params)
        for family in short
    }
    assert growth["transformer"] > 3
    assert growth["xlstm"] == pytest.approx(1, abs=0.2)


def test_budget_of_devices() -> None:
    assert budget_of(8, 72, H100, 0.4) == pytest.approx(8 * 72 * 3600 * 989e12 * 0.4)
    for arguments in ((0, 1, H100, 0.4), (1, -1, H100, 0.4), (1, 1, H100, 1.5)):
        with pytest.raises(ValueError, match="must"):
            budget_of(*arguments)


def test_outside_the_fitted_range_says_how_far(laws: dict) -> None:
    far = plan(1e25, laws, device=H100)
    notes = " ".join(place.sentence() for place in far["xlstm"][0].outside)
    assert "118 times the FLOPs of the largest run (8.48e+22)" in notes
    assert "times the parameters of the largest run (6.87e+09)" in notes
    assert "use more devices" in far["xlstm"][0].notes[0]
    inside = plan(1e21, laws, device=H100, gpus=64)
    assert inside["xlstm"][0].outside == inside["xlstm"][0].notes == ()
    other = plan(1e21, laws, device=H100, gpus=64, context_length=2048)
    assert other["xlstm"][0].notes == ("the law was fitted at context 8192, this is 2048",)
    below = plan(1e18, laws, device=H100)["xlstm"][0].outside
    assert "2.81 times fewer FLOPs than the smallest run (2.81e+18)" in [p.sentence() for p in below]


@pytest.mark.parametrize("flops", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_budgets(laws: dict, flops: float) -> None:
    with pytest.raises(ValueError, match="positive number of FLOPs"):
        plan(flops, laws, device=H100)


def test_budgets_beyond_any_known_size(laws: dict) -> None:
    with pytest.raises(ValueError, match="beyond the largest this planner knows"):
        plan(1e32, laws, device=H100)
    with pytest.raises(ValueError, match="context_length must be at least 1"):
        plan(1e20, laws, device=H100, context_length=0)


def test_the_laws_of_the_package_are_those_of_the_published_runs(runs: pd.DataFrame, laws: dict) -> None:
    for model, family in (("mlstm", "xlstm"), ("llama", "transformer")):
        table = runs[(runs["model"] == model) & (runs["experiment"] == "tokenparam")]
        fit = fit_runs(table, delta=1.0, free_gamma=True)
        law = laws[family]
        n, d = table["num_params"].to_numpy(), table["num_tokens"].to_numpy()
        assert [law.loss(a, b) for a, b in zip(n, d, strict=True)] == pytest.approx(fit(n, d), rel=1e-4)
        assert law.runs == len(table)
        assert law.flops[1] == pytest.approx(table["flops"].max(), rel=1e-5)
        covered = [
            low < loss < high
            for a, b, loss in zip(n, d, table["val_loss"], strict=True)
            for low, high in [law.interval(a, b)]
        ]
        assert np.mean(covered) > 0.85


def synthetic() -> pd.DataFrame:
    """A study whose law is known."""
    sizes, ratios = (u.ravel() for u in np.meshgrid(np.geomspace(1e4, 1e6, 6), np.geomspace(5, 300, 5)))
    tokens = sizes * ratios
    losses = 1.2 + 8 * sizes**-0.25 + 40 * tokens**-0.3
    losses *= np.exp(0.003 * np.random.default_rng(0).standard_normal(len(losses)))
    return pd.DataFrame(
        {"model": "xlstm", "context_length": 128, "num_params": sizes, "num_tokens": tokens,
         "flops": 6 * sizes * tokens, "val_loss": losses}
    )  # fmt: skip


def test_laws_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    synthetic().to_csv(tmp_path / "runs.csv", index=False)
    words = ["scaling", "fit", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "fit.html")]
    assert main([*words, "--laws", str(tmp_path / "laws.json")]) == 0
    laws, source = read_laws(tmp_path / "laws.json")
    assert list(laws) == ["xlstm"]
    assert source.endswith("runs.csv")
    capsys.readouterr()
    command = ["plan", "--flops", "1e12", "--laws", str(tmp_path / "laws.json"), "--vocab-size", "257"]
    assert main([*command, "--context-length", "128"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"xlstm\n +optimal +2x smaller", out)
    assert "transformer" not in out


def test_files_without_laws(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_laws(tmp_path / "absent.json")
    for text in ("no json", "{}", json.dumps({"format": "openxlstm laws 1", "laws": {"xlstm": {"a": 1}}})):
        (tmp_path / "laws.json").write_text(text)
        with pytest.raises(ValueError, match="is no file of laws"):
            read_laws(tmp_path / "laws.json")
    table = synthetic()
    fit = fit_runs(table)
    with pytest.raises(ValueError, match="no bootstrap samples"):
        law_of(fit, table["flops"], 128)
    law = law_of(bootstrap(fit, 10), table["flops"], 128)
    write_laws({"xlstm": law}, tmp_path / "again.json", "synthetic")
    assert read_laws(tmp_path / "again.json") == ({"xlstm": law}, "synthetic")


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--flops", "1e20"]) == 0
    out = capsys.readouterr().out
    for part in ("95 % interval", "assumed", "next token, ms", "learning rate", "state or cache"):
        assert part in out
    assert re.search(r"xlstm +transformer\n( +optimal +2x smaller +4x smaller +8x smaller){2}\n", out)
    assert "days" not in out  # nobody knows, without devices
    assert max(map(len, out.splitlines())) <= 125
    assert main(["plan", "--gpus", "8", "--hours", "72", "--device", "h100"]) == 0
    assert "3.00" in capsys.readouterr().out  # days
    assert main(["plan", "--flops", "1e24"]) == 0
    out = capsys.readouterr().out
    assert "warnings" in out
    assert out.count("xlstm, all: 11.8 times the FLOPs of the largest run (8.48e+22)") == 1
    assert re.search(r"xlstm, .*: \S+ to \S+ times the tokens of the largest run", out)
    assert out.count("xlstm, ") <= 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the budget"),
        (["--gpus", "8"], "give the budget"),
        (["--flops", "1e20", "--hours", "3"], "say the same thing"),
        (["--flops", "1e20", "--device", "h10"], "unknown device 'h10'"),
        (["--gpus", "0", "--hours", "1"], "--gpus must be positive"),
        (["--gpus", "1", "--hours", "1", "--utilisation", "2"], "--utilisation must lie in"),
        (["--flops", "-1"], "--flops must be a positive number of FLOPs"),
        (["--flops", "1e20", "--context-length", "0"], "--context-length must be at least 1"),
        (["--flops", "1e20", "--vocab-size", "1"], "--vocab-size must be at least 2"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
