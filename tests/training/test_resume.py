"""Resuming: 20 updates are 10 updates, a kill, and 10 updates, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openxlstm.checkpoint import byte_tokenizer
from openxlstm.data import prepare
from openxlstm.data.sources import Texts
from openxlstm.models import build_model
from openxlstm.training import NonFiniteLossError, Trainer, TrainingInterrupted, checkpointing, read_log

Make = Callable[..., Trainer]
Log = Callable[[Path], list[dict[str, Any]]]
TOY = Path(__file__).with_name("toy.py")


def program(data: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, str(TOY), str(data), str(output), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and any(record["step"] >= step for record in read_log(log)):
            return
        time.sleep(0.05)
    raise TimeoutError(f"the run did not reach step {step}")


def assert_same_checkpoint(left: Path, right: Path, step: int) -> None:
    """Equal parameters, moments, generator states and positions."""
    a, b = (path / "checkpoints" / f"step_{step:08d}" for path in (left, right))
    for group in ("model", "optimizer", "random"):
        one, two = load_file(a / f"{group}.safetensors"), load_file(b / f"{group}.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), group
    one, two = (json.loads((path / "state.json").read_text()) for path in (a, b))
    for state in (one, two):
        del state["seconds"], state["train"]
    assert one == two
    assert one["data"]["step"] == step


def draws(model: torch.nn.Module, step: int) -> list[str]:
    return [f"{float(torch.rand(())):.6f}"]


@pytest.fixture(scope="session")
def straight(toy: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 updates without interruption."""
    output = tmp_path_factory.mktemp("straight") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    toy.make_trainer(data, output, sample=draws).fit()
    torch.set_num_threads(threads)
    return output


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_resume_in_process(make_trainer: Make, tmp_path: Path, straight: Path, log_of: Log) -> None:
    class Crash(Exception):
        pass

    def crash(model: torch.nn.Module, step: int) -> list[str]:
        if step == 13:
            raise Crash
        return draws(model, step)

    with pytest.raises(Crash):
        make_trainer(tmp_path / "run", sample=crash).fit()
    torch.rand(100)
    torch.manual_seed(99)
    make_trainer(tmp_path / "run", sample=draws).fit(resume=True)
    assert_same_checkpoint(tmp_path / "run", straight, 20)
    assert log_of(tmp_path / "run") == log_of(straight)


def test_resume_after_kill_9(tmp_path: Path, data: Path, straight: Path, log_of: Log) -> None:
    output = tmp_path / "run"
    killed = subprocess.run(program(data, output, "20", "--kill-at", "13"), env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000010"]
    assert read_log(output / "log.jsonl")[-1]["step"] == 13
    with open(output / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # as if the kill had come in the middle of a line
    (output / "checkpoints" / ".step_00000012.77.tmp").mkdir()  # ... or of a checkpoint
    subprocess.run(program(data, output, "20", "--resume"), env=environment(), check=True)
    assert_same_checkpoint(output, straight, 20)
    assert log_of(output) == log_of(straight)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step_00000010",
        "step_00000020",
    ]


def test_a_kill_before_the_first_checkpoint_starts_over(
    make_trainer: Make, tmp_path: Path, straight: Path, log_of: Log
) -> None:
    def crash(model: torch.nn.Module, step: int) -> list[str]:
        raise MemoryError

    with pytest.raises(MemoryError):
        make_trainer(tmp_path / "run", sample=crash).fit()
    make_trainer(tmp_path / "run", sample=draws).fit(resume=True)
    assert log_of(tmp_path / "run") == log_of(straight)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    make_trainer: Make, tmp_path: Path, straight: Path, log_of: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    with open(output / "checkpoints" / "step_00000020" / "optimizer.safetensors", "rb+") as file:
        file.truncate(100)
    make_trainer(output, sample=draws, progress=True).fit(resume=True)
    assert "is truncated" in capsys.readouterr().err
    assert_same_checkpoint(output, straight, 20)
    assert log_of(output) == log_of(straight)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, data: Path, straight: Path, log_of: Log) -> None:
    output = tmp_path / "run"
    command = program(data, output, "20000")
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_step(output / "log.jsonl", 3)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert "press Ctrl-C again" in error
    assert "everything is saved in" in error
    assert "resume with" in error
    assert "Traceback" not in error
    checkpoints = sorted((output / "checkpoints").iterdir())
    assert int(checkpoints[-1].name.split("_")[1]) == read_log(output / "log.jsonl")[-1]["step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step_and_resumes_exactly(
    make_trainer: Make, tmp_path: Path, straight: Path, log_of: Log, number: signal.Signals
) -> None:
    def interrupt(model: torch.nn.Module, step: int) -> list[str]:
        if step == 7:
            os.kill(os.getpid(), number)
        return draws(model, step)

    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="stopped after step 7 of 20") as caught:
        make_trainer(tmp_path / "run", sample=interrupt).fit()
    assert signal.getsignal(number) is before
    assert isinstance(caught.value, KeyboardInterrupt)
    assert (caught.value.step, caught.value.checkpoint.name) == (7, "step_00000007")
    make_trainer(tmp_path / "run", sample=draws).fit(resume=True)
    assert_same_checkpoint(tmp_path / "run", straight, 20)
    assert log_of(tmp_path / "run") == log_of(straight)


def test_the_second_signal_quits_at_once(make_trainer: Make, tmp_path: Path) -> None:
    def interrupt(model: torch.nn.Module, step: int) -> list[str]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return []

    with pytest.raises(KeyboardInterrupt, match="stopped at once") as caught:
        make_trainer(tmp_path / "run", sample=interrupt).fit()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_while_saving_stops_the_run_and_costs_nothing_earlier(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path, log_of: Log
) -> None:
    trainer = make_trainer(tmp_path / "run", sample=draws)
    write = checkpointing.save_file

    def full(*arguments: Any) -> None:
        if trainer.step > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", full)
        with pytest.raises(OSError, match=r"No space left on device; .*step_00000010") as caught:
            trainer.fit()
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "run" / "model").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000010"]
    make_trainer(tmp_path / "run", sample=draws).fit(resume=True)
    assert_same_checkpoint(tmp_path / "run", straight, 20)
    assert log_of(tmp_path / "run") == log_of(straight)


def test_a_resumed_run_can_be_longer_and_slower(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", steps=4).fit()
    result = make_trainer(
        tmp_path / "run", steps=6, learning_rate=1e-4, schedule="constant", gradient_accumulation=2
    ).fit(resume=True)
    assert result.step == 6
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [r["learning_rate"] for r in records if r["kind"] == "train"][4:] == [1e-4, 1e-4]
    (changed,) = [record["changed"] for record in records if record["kind"] == "resume"]
    assert changed["learning_rate"] == [1e-2, 1e-4]
    assert changed["steps"] == [4, 6]
    assert "output" not in changed


def test_a_finished_run_resumes_to_its_result(make_trainer: Make, tmp_path: Path, log_of: Log) -> None:
    first = make_trainer(tmp_path / "run", steps=4).fit()
    log = log_of(tmp_path / "run")
    again = make_trainer(tmp_path / "run", steps=4).fit(resume=True)
    assert again == first
    assert log_of(tmp_path / "run") == log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8}, "batch_size must stay 4"),
        ({"seed": 5}, "seed must stay 0"),
        ({"steps": 3}, "has more than the 3 steps"),
    ],
)
def test_settings_that_cannot_change(
    make_trainer: Make, tmp_path: Path, straight: Path, settings: dict[str, Any], message: str
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **settings).fit(resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_another_model_is_refused(make_trainer: Make, tmp_path: Path, straight: Path, toy: Any) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another model: embedding_dim is 16 there and 32 here"):
        make_trainer(tmp_path / "run", model=build_model({**toy.MODEL, "embedding_dim": 32})).fit(resume=True)


def test_other_data_is_refused(toy: Any, tmp_path: Path, straight: Path) -> None:
    texts = [f"something else, number {n}" for n in range(30)]
    prepare(Texts(texts), tmp_path / "data", byte_tokenizer(), validation_fraction=0.2, progress=False)
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(ValueError, match="was saved with other data"):
        toy.make_trainer(tmp_path / "data", tmp_path / "run").fit(resume=True)


def test_a_diverged_run_resumes_from_the_named_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", steps=12, checkpoint_every=4)
    trainer.model.xlstm_block_stack.register_forward_hook(
        lambda module, inputs, output: output * float("nan") if trainer.step == 6 else output
    )
    with pytest.raises(NonFiniteLossError, match="step_00000004"):
        trainer.fit()
    result = make_trainer(tmp_path / "run", steps=12, checkpoint_every=4, learning_rate=1e-3).fit(resume=True)
    assert result.step == 12
