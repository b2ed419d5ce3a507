"""Designs, and a real study of tiny models through the command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from openxlstm.cli.main import main
from openxlstm.models import build_config, parameter_count
from openxlstm.models.accounting import training_flops_per_token
from openxlstm.scaling.data import check_runs, read_runs
from openxlstm.scaling.design import design, planned_run, recommended_batch, recommended_rate, shapes
from openxlstm.scaling.study import analyse, study_report
from openxlstm.scaling.sweep import Sweep, environment

OPTIONS: dict[str, Any] = {"vocab_size": 257, "context_length": 64}


def test_a_design_meets_its_budgets() -> None:
    runs = design([1e12, 1e13], sizes=5, ratios=[5, 50], **OPTIONS)
    assert {run.family for run in runs} == {"xlstm", "transformer"}
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = build_config(run.model)
        assert parameter_count(config) == run.num_params
        assert run.flops == training_flops_per_token(config, 64) * run.num_tokens
        if run.experiment == "isoflop":
            assert run.flops == pytest.approx(run.budget, rel=0.02)
        else:
            assert run.num_tokens / run.num_params == pytest.approx(float(run.preset_ratio), rel=0.02)
        assert run.steps >= 45
    for family in ("xlstm", "transformer"):
        sizes = [r.num_params for r in runs if r.family == family and r.budget == 1e13]
        centre = math.sqrt(1e13 / 120)
        assert len(sizes) == 5
        assert min(sizes) < centre / 2
        assert max(sizes) > 2 * centre


def test_proportions_reach_the_published_sizes() -> None:
    for family in ("xlstm", "transformer"):
        counts = [parameter_count(config) for config in shapes(family, 50304)]
        assert counts == sorted(counts)
        assert counts[0] < 2e6
        assert counts[-1] > 2e10
    widths = {c.embedding_dim: c.num_blocks for c in shapes("xlstm", 50304)}
    assert 12 <= widths[768] <= 24
    assert 24 <= widths[2048] <= 32
    assert 28 <= widths[4096] <= 40


def test_recommendations_are_those_of_the_sources() -> None:
    assert recommended_rate(1.6e8, 1e20) == 3e-3
    assert recommended_rate(7e9, 1e22) == 5e-4
    assert recommended_rate(1e6, 1e14) == pytest.approx(0.3118 * 1e14**-0.125, rel=0.02)
    assert recommended_batch(1.6e8, 1e20) == 2**20
    assert recommended_batch(1e6, 1e14) == pytest.approx(0.292 * 1e14**0.3271)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": [1e8]}, "too small for a profile of xlstm models"),
        ({"budgets": []}, "budgets must be positive numbers"),
        ({"budgets": [-1e12]}, "budgets must be positive numbers"),
        ({"sizes": 2}, "sizes must be at least 3"),
        ({"spread": 1.0}, "spread must be above 1"),
        ({"ratios": [0.0]}, "ratios must be positive"),
        ({"families": ["mamba"]}, "unknown family 'mamba'"),
    ],
)
def test_impossible_designs(changes: dict, message: str) -> None:
    options: dict[str, Any] = {"budgets": [1e12], **OPTIONS} | changes
    budgets = options.pop("budgets")
    with pytest.raises(ValueError, match=message):
        design(budgets, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little prepared text."""
    folder, shards = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data") / "shards"
    texts = [f"def f{n}(x):\n    return x + {n * 7 % 23}\n" * 3 for n in range(60)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    code = main(["data", str(folder), "--output", str(shards), "--tokenizer", "bytes"])
    assert code == 0
    return shards


STUDY = ["--budgets", "2e9", "--spread", "6", "--ratios", "2", "--grid-sizes", "2", "--context-length", "32"]
STUDY += ["--families", "transformer"]
"""A profile of three sizes and two of them at 2 tokens per parameter: seconds of training."""


class InThisProcess:
    """Runs what a process would be started for, without the seconds that starting it takes."""

    def __init__(self, words: list[str], stdout: Any, env: dict[str, str], **_: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "openxlstm.cli"]
        assert env["OMP_NUM_THREADS"] == "1"
        with io.TextIOWrapper(stdout) as file, contextlib.redirect_stdout(file):
            self.code = main(words[3:])

    def poll(self) -> int:
        return self.code


def test_a_study_runs_stops_and_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study"
    words = ["scaling", "sweep", str(study)]
    begin = ["--data", str(data), *STUDY]
    assert main([*words, *begin, "--minutes", "0"]) == 2  # nothing is finished yet
    assert "no run of" in capsys.readouterr().err
    sweep, done = Sweep.open(study), []
    assert Sweep(study, sweep.runs[2:3], sweep.data).run(progress=done.append) == []  # a process of its own
    assert done[-1] == sweep.runs[2].flops
    monkeypatch.setattr("openxlstm.scaling.sweep.subprocess", SimpleNamespace(Popen=InThisProcess))
    assert main([*words, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 runs finished" in printed
    table = pd.read_csv(study / "runs.csv")
    assert len(read_runs(study / "runs.csv")) == 5
    assert table["val_loss"].between(0.1, 7).all()
    grid = table[table["experiment"] == "tokenparam"]
    assert len(grid) == 2
    assert (grid["num_tokens"] / grid["num_params"]).to_numpy() == pytest.approx(2, rel=0.05)
    page = (study / "report.html").read_text()
    for part in ("Assumptions and limits", "Over-training", "tokens per parameter"):
        assert part in page
    assert page.count("data:image/png;base64,") >= 1
    assert "http" not in page.replace("http://www.w3.org", "")

    assert main([*words, *begin]) == 0  # nothing left to do
    assert "5 runs, 0 to do" in capsys.readouterr().out
    assert main([*words, *begin, "--context-length", "16"]) == 2
    assert "holds another design" in capsys.readouterr().err
    assert main(["scaling", "fit", str(study / "runs.csv"), "--output", str(tmp_path / "fit.html")]) == 0


def test_commands_of_the_launchers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = tmp_path / "a study"
    words = ["scaling", "sweep", str(study)]
    assert main([*words, "--data", str(data), *STUDY, "--launcher", "shell"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"openxlstm train '/.*/a study/runs/.*\.yaml'", line) for line in lines)
    name = Path(shlex.split(lines[0])[-1]).stem
    (study / "runs" / name / "checkpoints" / "step-1").mkdir(parents=True)  # as an interrupted run leaves it
    assert main([*words, "--launcher", "shell"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("--resume")
    assert main([*words, "--launcher", "torchrun", "--jobs", "4"]) == 0
    command = f"torchrun --standalone --nproc-per-node 4 -m openxlstm.cli scaling sweep '{study}'"
    assert capsys.readouterr().out.strip() == command


def test_the_slurm_script_begins_and_resumes_runs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The script itself, run by bash, with a stand-in for srun that shows what it was given."""
    study = tmp_path / "a study"
    words = ["scaling", "sweep", str(study), "--data", str(data), *STUDY, "--launcher", "slurm"]
    assert main([*words, "--jobs", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash\n")  # redirected into a file, it is a script
    assert "5 runs, 5 to do" in captured.err
    assert "#SBATCH --array=0-4%2" in captured.out
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    recipes = sorted((study / "runs").glob("*.yaml"))

    def submitted(task: int) -> list[str]:
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
        script = ["bash", "-eu", "-c", captured.out]
        return subprocess.run(script, env=variables, capture_output=True, text=True).stdout.splitlines()

    given = [submitted(task) for task in range(5)]
    assert all(words[:2] == ["openxlstm", "train"] and len(words) == 3 for words in given)
    assert sorted(Path(words[2]) for words in given) == recipes
    (Path(given[0][2]).with_suffix("") / "checkpoints" / "step-1").mkdir(parents=True)
    assert submitted(0)[3:] == ["--resume"]


def test_processes_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = design([1e12, 1e13], sizes=4, ratios=[5], **OPTIONS)
    sweep = Sweep(tmp_path, runs, tmp_path)
    shares = [sweep.share(rank, 3).runs for rank in range(3)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in runs)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    variables = [environment(2, slot) for slot in range(3)]
    assert [v["CUDA_VISIBLE_DEVICES"] for v in variables] == ["4", "6", "4"]
    assert all(v["OMP_NUM_THREADS"] == "2" and "WORLD_SIZE" not in v for v in variables)


@pytest.mark.slow
def test_torchrun(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two processes share a study for real; training itself refuses a second process."""
    study = tmp_path / "study"
    words = ["scaling", "sweep", str(study)]
    assert main([*words, "--data", str(data), *STUDY, "--launcher", "torchrun", "--jobs", "2"]) == 0
    command = shlex.split(capsys.readouterr().out)
    module = [sys.executable, "-m", "torch.distributed.run"]
    result = subprocess.run([*module, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("has done its share") == 2
    assert main(words) == 0
    assert "5 runs, 0 to do" in capsys.readouterr().out
    recipe = str(next((study / "runs").glob("*.yaml")))
    for processes, expected in ((1, "holds a run"), (2, "one process trains, torchrun started 2")):
        start = ["--standalone", "--nproc-per-node", str(processes), "-m", "openxlstm.cli", "train", recipe]
        result = subprocess.run([*module, *start], capture_output=True, text=True)
        assert result.returncode != 0
        assert expected in result.stderr


def test_a_run_that_fails_is_named(data: Path, tmp_path: Path) -> None:
    runs = design([1e12], sizes=3, families=["transformer"], **OPTIONS)[:1]
    sweep = Sweep.create(tmp_path / "study", runs, data.parent / "absent")
    failures = sweep.run()
    assert len(failures) == 1
    assert runs[0].name in failures[0]
    assert "absent" in failures[0]
    with pytest.raises(ValueError, match=r"no run of .* is finished yet"):
        sweep.collect()
    with pytest.raises(ValueError, match="unknown launcher 'bsub'"):
        sweep.commands("bsub")


def test_studies_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["scaling", "sweep", str(tmp_path)]) == 1
    assert "holds no study" in capsys.readouterr().err
    assert main(["scaling", "sweep", str(tmp_path), "--budgets", "1e12"]) == 2
    assert "needs both --data" in capsys.readouterr().err
    (tmp_path / "design.json").write_text(json.dumps({"data": "x", "runs": [{"name": "a"}]}))
    assert main(["scaling", "sweep", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err
    assert main(["scaling", "repoduce"]) == 2
    assert "Did you mean 'reproduce'?" in capsys.readouterr().err
    assert main(["scaling"]) == 0
    assert "reproduce" in capsys.readouterr().out


def test_a_study_that_allows_no_fit_still_reports() -> None:
    rows = [
        {"model": "xlstm", "context_length": 64, "num_params": n, "num_tokens": 1e9 / n, "flops": 6e9,
         "val_loss": 3.0 - 0.1 * k, "isoflop": 6e9, "experiment": "isoflop", "learning_rate": 0.01,
         "global_batch_size": 1, "num_steps": 10, "embedding_dim": 16, "num_blocks": 2}
        for k, n in enumerate([1e4, 2e4])
    ]  # fmt: skip
    (result,) = analyse(check_runs(pd.DataFrame(rows)))
    assert any("needs at least 3 runs, got 2" in note for note in result.notes)
    assert any("a parametric fit needs at least 7 runs" in note for note in result.notes)
    page = study_report([result], "A title <b>", ["A fact."], ["A limit."]).render()
    assert "A title &lt;b&gt;" in page
    assert "A limit." in page


def test_a_planned_run_survives_json() -> None:
    run = design([1e12], sizes=3, **OPTIONS)[0]
    assert planned_run(json.loads(json.dumps(run.values()))) == run
