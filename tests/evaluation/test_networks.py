"""Networks by name: streaming equals whole, equal parameters, the ablation, and the study around them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openxlstm.evaluation import trial as trial_module
from openxlstm.evaluation.networks import NETWORKS, available, count_parameters, get_network, width_for
from openxlstm.evaluation.presets import comparison, lengths, slow_state_tracking, trade_off
from openxlstm.evaluation.recurrent_lm import RecurrentLM, RecurrentLMConfig
from openxlstm.evaluation.report import summarise, table, write_report
from openxlstm.evaluation.statistics import estimate
from openxlstm.evaluation.study import run_study, trial_name
from openxlstm.evaluation.tasks import TASKS
from openxlstm.evaluation.trial import Trial, build_network, measure, run_trial, streamed_logits

OURS = [name for name in NETWORKS if name != "mamba"]
SMALL = Trial(
    "parity", "slstm", width=8, steps=3, batch_size=4, test_strings=8, test_lengths=((3, 9), (10, 20))
)


@pytest.mark.parametrize("name", OURS)
def test_streaming_in_pieces_equals_the_whole(name: str) -> None:
    model = NETWORKS[name].build(11, 32, NETWORKS[name].blocks)
    tokens = torch.randint(11, (3, 50))
    whole = torch.cat(list(streamed_logits(model, tokens, 50)), dim=1)
    pieces = torch.cat(list(streamed_logits(model, tokens, 7)), dim=1)
    assert whole.shape == (3, 50, 11)
    assert torch.allclose(whole, pieces, atol=1e-4)
    assert model.training


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_classical_networks(cell: str) -> None:
    model = RecurrentLM(RecurrentLMConfig(cell, 7, 16, 2))  # type: ignore[arg-type]
    tokens = torch.randint(7, (2, 9))
    _, state = model(tokens[:, :8], return_state=True)
    stepped, _ = model.step(tokens[:, 8:], state)
    assert torch.allclose(stepped, model(tokens)[:, 8:], atol=1e-5)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    assert torch.allclose(model(tokens, reset=reset)[:, 4:], model(tokens[:, 4:]), atol=1e-5)
    names = [name for part in model.weight_decay_split() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    if cell == "lstm":
        theirs = torch.nn.LSTM(16, 16, 2)
        ours = sum(p.numel() for p in model.layers.parameters())
        assert ours == sum(p.numel() for p in theirs.parameters()) - 2 * 64  # theirs has every bias twice
    with pytest.raises(ValueError, match="embedding_dim must be at least 1"):
        RecurrentLMConfig("gru", 7, 0)


def test_mamba_runs_through_transformers() -> None:
    pytest.importorskip("transformers")
    model = NETWORKS["mamba"].build(5, 16, 1)
    tokens = torch.randint(5, (2, 6))
    (logits,) = streamed_logits(model, tokens)
    assert logits.shape == (2, 6, 5)
    groups = model.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_parallel_scan_of_mamba_changes_nothing() -> None:
    pytest.importorskip("mambapy")
    model = NETWORKS["mamba"].build(5, 16, 2)
    tokens = torch.randint(5, (2, 37))
    parallel = model(tokens)
    for layer in model.model.backbone.layers:
        assert layer.mixer.use_mambapy
        layer.mixer.use_mambapy = False
    torch.testing.assert_close(parallel, model(tokens), atol=1e-6, rtol=1e-5)


def test_no_recurrence_means_none_after_training() -> None:
    trial = dataclasses.replace(SMALL, model="slstm-no-recurrence")
    result = run_trial(trial)
    assert result["parameters"] == count_parameters(build_network(SMALL)) - 4 * 8 * 8
    model = build_network(trial)
    optimizer = trial_module.build_optimizer(model, trial.trainer_config())
    trial_module._update(trial, TASKS["parity"], model, optimizer, trial.trainer_config(), 0)
    kernels = [p for name, p in model.named_parameters() if "recurrent_kernel" in name]
    assert kernels
    assert not any(p.any() for p in kernels)


def test_width_comes_near_the_parameters() -> None:
    for name in OURS:
        width = width_for(name, 9, 40_000)
        with torch.device("meta"):
            count = count_parameters(NETWORKS[name].build(9, width, NETWORKS[name].blocks))
        assert abs(count - 40_000) / 40_000 < 0.2, (name, width, count)
    with pytest.raises(ValueError, match=r"the narrowest xlstm-3-1 of 4 blocks over 9 tokens has .* too few"):
        width_for("xlstm-3-1", 9, 100)


def test_an_interrupted_trial_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = dataclasses.replace(SMALL, steps=6)
    whole = run_trial(trial)
    path, real, calls = tmp_path / "t.safetensors", trial_module._update, []
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0.0)

    def stop_at_four(*arguments: object) -> float:
        calls.append(arguments[-1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_module, "_update", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial, checkpoint=path)
    assert path.is_file()
    again = run_trial(trial, checkpoint=path)
    assert calls[5:] == [4, 5]
    assert not path.exists()
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_every_prefix_of_the_range_counts_and_no_other() -> None:
    model = build_network(SMALL)
    part = measure(model, TASKS["parity"], SMALL, (10, 20))
    assert part["answers"] == 8 * 11
    last = measure(model, TASKS["parity"], dataclasses.replace(SMALL, protocol="last"), (10, 20))
    assert last["answers"] == 8
    assert 0 <= part["accuracy"] <= 1
    assert part["scaled"] == pytest.approx(2 * part["accuracy"] - 1)


def test_a_study_in_processes_resumes_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trials = [dataclasses.replace(SMALL, model=m, seed=s) for m in ("slstm", "lstm") for s in (0, 1)]
    lines: list[str] = []
    results = run_study(trials, tmp_path, processes=2, report=lines.append)
    assert [r["trial"]["model"] for r in results] == ["slstm", "slstm", "lstm", "lstm"]
    assert len(lines) == 4
    alone = run_study(trials[:1], tmp_path / "alone", processes=1)
    assert {**alone[0], "seconds": 0} == {**results[0], "seconds": 0}  # processes change nothing
    (tmp_path / "trials" / f"{trial_name(trials[3])}.json").unlink()
    lines.clear()
    assert run_study(trials, tmp_path, processes=1, report=lines.append)[3]["curve"] == results[3]["curve"]
    assert lines[0] == "3 of 4 trials are done already"

    page = write_report(results, tmp_path, title="A <study>", command="openxlstm eval compare").read_text()
    assert "A &lt;study&gt;" in page
    assert page.count("data:image/png;base64,") == 3
    assert 'src="http' not in page
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 4 * 2
    rows = summarise(results)
    assert [row.model for row in rows] == ["slstm", "lstm"]
    assert rows[0].loss.runs == 2
    assert "### parity: 3 steps, 2 seeds" in table(rows)
    assert "±" in table(rows)


def test_estimates() -> None:
    assert str(estimate([0.5])) == "0.500"
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.303 / 3**0.5)
    assert estimate([1.0] * 50).half_width == 0
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_presets_are_sound() -> None:
    names = [trial_name(trial) for trial in (*trade_off((0, 1)), *slow_state_tracking())]
    assert len(set(names)) == len(names)
    for task in TASKS:
        Trial(task, "slstm", **lengths(task))
    trials = comparison(
        ["slstm", "lstm"], ["parity", "s3"], seeds=2, steps=10, parameters=20_000, batch_size=4
    )
    assert len(trials) == 8
    assert {trial.batch_size for trial in trials} == {4}
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        comparison(["slstm"], ["parity"], seeds=0, steps=1, parameters=20_000)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'slstn'. Did you mean 'slstm'\?"):
        get_network("slstn")
    with pytest.raises(ValueError, match="unknown task 'parties'"):
        Trial("parties", "slstm")
    with pytest.raises(ValueError, match="no strings of a length from 300 to 400"):
        Trial("majority-count", "slstm", test_lengths=((300, 400),))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Trial("parity", "slstm", steps=0)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        run_study([], "anywhere", processes=0)
    assert available("slstm") is None


KILLED = """
import dataclasses, sys
from openxlstm.evaluation import Trial, run_study

if __name__ == "__main__":
    short = Trial("parity", "lstm", width=8, steps=1, batch_size=2, test_lengths=((3, 5),), test_strings=2)
    long = [dataclasses.replace(short, steps=10**6, seed=seed) for seed in (1, 2)]
    run_study([short, *long], sys.argv[1], processes=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for child processes in /proc")
def test_workers_end_with_a_killed_study(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out")])
    deadline = time.monotonic() + 120
    try:
        while not list((tmp_path / "out").rglob("*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    deadline = time.monotonic() + 60
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, "workers outlive the study"
        time.sleep(0.05)


def _runs(process_id: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return bool(Path(f"/proc/{process_id}/cmdline").read_text())  # a zombie has none
    return False


@pytest.mark.slow
def test_the_trade_off(tmp_path: Path) -> None:
    """Memory mixing tracks states, matrix memory recalls: the trials of ``openxlstm eval state-tracking``."""
    found = {}
    for result in run_study(trade_off(), tmp_path, processes=1):
        found[result["trial"]["task"], result["trial"]["model"]] = [p["accuracy"] for p in result["accuracy"]]
    assert min(found["parity", "slstm"][1:]) >= 0.99
    assert max(found["parity", "slstm-no-recurrence"][1:]) < 0.60
    assert max(found["parity", "mlstm"][1:]) < 0.60
    assert TASKS["s3"].scaled(found["s3", "slstm"][1]) >= 0.95
    assert found["mqar-small", "mlstm"][0] >= 0.95
    assert found["mqar-small", "slstm"][0] < 0.60
    assert json.loads(next((tmp_path / "trials").glob("*.json")).read_text())["parameters"] > 0
