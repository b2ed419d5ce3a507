"""The loop: exact accumulation, determinism, validation and samples that change nothing, stopping on NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import openxlstm
from openxlstm.data import Batch
from openxlstm.models import build_model
from openxlstm.training import NonFiniteLossError, Trainer, TrainerConfig, read_log

Make = Callable[..., Trainer]
Log = Callable[[Path], list[dict[str, Any]]]
FIELDS = {"model_type": "xlstm_lm", "vocab_size": 23, "embedding_dim": 16, "num_blocks": 2, "slstm_at": [1]}


class Uneven:
    """Six rows whose numbers of counted targets differ widely."""

    def __len__(self) -> int:
        return 1

    def batch(self, step: int, rank: int, world_size: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 23, (6, 13), generator=generator)
        targets = ids[:, 1:].clone()
        for row, ignored in enumerate((0, 12, 3, 11, 7, 0)):
            targets[row, :ignored] = -100
        reset = torch.zeros(6, 12, dtype=torch.bool)
        reset[:, 0] = reset[2, 5] = True
        batch = Batch(ids[:, :-1].contiguous(), targets, reset)
        count = 6 // world_size
        return Batch(*(tensor[rank * count : (rank + 1) * count] for tensor in batch))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def gradients_of_one_step(tmp_path: Path, parts: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    model = build_model(FIELDS).to(dtype)
    config = TrainerConfig(
        steps=1, batch_size=6, gradient_accumulation=parts, clip=0.0, device="cpu", precision="float32",
        output=tmp_path / f"{parts}-{dtype}", tensorboard=False, progress=False,
    )  # fmt: skip
    trainer = Trainer(model, config, Uneven())
    captured: list[Tensor] = []
    trainer.optimizer.step = lambda: captured.extend(  # pyright: ignore[reportAttributeAccessIssue]
        p.grad.clone() for p in model.parameters() if p.grad is not None
    )
    trainer.fit()
    return captured


def gradients_of_the_mean_loss(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    model = build_model(FIELDS).to(dtype)
    batch = Uneven().batch(0, 0, 1)
    logits = model(batch.tokens, reset=batch.reset)
    F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("parts", [1, 2, 4, 6])
def test_accumulation_is_exact(
    tmp_path: Path, rel_error: Callable[..., float], parts: int, dtype: torch.dtype, tolerance: float
) -> None:
    actual, expected = gradients_of_one_step(tmp_path, parts, dtype), gradients_of_the_mean_loss(dtype)
    assert len(actual) == len(expected) > 10
    assert rel_error(torch.cat([g.flatten() for g in actual]), torch.cat([g.flatten() for g in expected])) < (
        tolerance
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_averaging_over_processes_gives_the_same_gradient(
    tmp_path: Path, rel_error: Callable[..., float], parts: int
) -> None:
    """What data parallelism does: each process its rows, gradients averaged, tokens counted over all."""
    everything = Uneven().batch(0, 0, 1).num_targets
    averaged: list[Tensor] = []
    for rank in range(2):
        torch.manual_seed(1)
        model = build_model(FIELDS).double()
        config = TrainerConfig(
            steps=1, batch_size=6, gradient_accumulation=parts, device="cpu", precision="float32", clip=0.0,
            output=tmp_path / str(rank), tensorboard=False, progress=False,
        )  # fmt: skip
        trainer = Trainer(model, config, Uneven(), rank=rank, world_size=2)
        trainer._sum_over_processes = lambda value: (  # stands for all_reduce
            value if value.is_floating_point() else torch.tensor(everything)
        )
        trainer.optimizer.step = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        trainer.optimizer.zero_grad = lambda set_to_none=True: None
        trainer.fit()
        averaged.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / 2)
    expected = torch.cat([gradient.flatten() for gradient in gradients_of_the_mean_loss(torch.float64)])
    assert rel_error(averaged[0] + averaged[1], expected) < 1e-12
    assert not (tmp_path / "1").exists()  # only the first process writes


def test_a_run_from_start_to_model(make_trainer: Make, tmp_path: Path, data: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        steps=60,
        sample=lambda model, step: [f"after {step}"],
        sample_every=30,
        tensorboard=True,
    )
    result = trainer.fit()
    records = read_log(tmp_path / "run" / "log.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 61))
    assert train[-1]["loss"] < train[0]["loss"] - 1.0
    assert train[-1]["tokens"] == result.tokens == 60 * 4 * 16
    assert {"bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_second", "utilisation"} <= set(
        train[0]
    )
    validation = [record for record in records if record["kind"] == "validation"]
    assert validation[-1]["step"] == 60
    assert validation[-1]["loss"] == result.validation_loss
    dataset = trainer.validation_loader.dataset  # pyright: ignore
    assert result.validation_loss is not None
    assert result.bits_per_byte == pytest.approx(dataset.bits_per_byte(result.validation_loss))
    assert [r["texts"] for r in records if r["kind"] == "sample"] == [["after 30"], ["after 60"]]
    assert records[0]["kind"] == "start"
    assert records[0]["environment"]["threads"] >= 1
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())

    for saved in (result.model_directory, tmp_path / "run" / "checkpoints" / "step_00000060"):
        model, tokenizer = openxlstm.load_pretrained(saved)
        assert tokenizer is not None
        assert tokenizer.vocab_size == 257
        state = trainer.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_same_seed_same_curve_whatever_is_watched(make_trainer: Make, tmp_path: Path, log_of: Log) -> None:
    def noisy(model: torch.nn.Module, step: int) -> list[str]:
        torch.rand(step)
        return []

    make_trainer(tmp_path / "a", steps=6).fit()
    make_trainer(tmp_path / "b", steps=6).fit()
    make_trainer(tmp_path / "c", steps=6, validation_every=1, sample=noisy, sample_every=2).fit()
    make_trainer(tmp_path / "d", steps=6, seed=1).fit()
    curves = {
        name: [r["loss"] for r in log_of(tmp_path / name) if r["kind"] == "train"]
        for name in ("a", "b", "c", "d")
    }
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert curves["a"] == curves["c"]
    assert curves["a"] != curves["d"]


def test_validation_counts_every_token_once(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    loader = trainer.validation_loader
    assert loader is not None
    total, counted = 0.0, 0
    trainer.model.eval()
    with torch.no_grad():
        for index in range(len(loader)):
            batch = loader.batch(index, 0, 1)
            logits = trainer.model(batch.tokens, reset=batch.reset)
            losses = F.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="none"
            )
            total, counted = total + float(losses.double().sum()), counted + batch.num_targets
    assert counted == len(loader.dataset)  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.evaluate(loader) == pytest.approx(total / counted, rel=1e-6)
    assert trainer.evaluate(loader, 10_000) == trainer.evaluate(loader)
    assert trainer.evaluate(loader, 1) != trainer.evaluate(loader)


def test_bfloat16_autocast_trains_float32_parameters(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", steps=2, precision="bfloat16", validation_every=0)
    assert math.isfinite(trainer.fit().validation_loss or math.nan)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_a_number_stops_before_the_update(make_trainer: Make, tmp_path: Path, what: str) -> None:
    trainer = make_trainer(tmp_path / "run", checkpoint_every=5)
    parameter = next(trainer.model.parameters())

    def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if trainer.step != 7 or not module.training:
            return output
        if what == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    trainer.model.xlstm_block_stack.register_forward_hook(poison)
    message = "loss is nan" if what == "loss" else "gradient norm is"
    with pytest.raises(NonFiniteLossError, match=f"(?s){message}.* at step 8 .*step_00000005") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    assert trainer.step == 7
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert isinstance(parameter, Tensor)
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "train"][-1] == 7


def test_not_a_number_before_any_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.model.xlstm_block_stack.register_forward_hook(
        lambda module, inputs, output: output * float("inf")
    )
    with pytest.raises(NonFiniteLossError, match="no checkpoint was written yet"):
        trainer.fit()


def test_batch_size_must_be_the_loaders(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    other = Trainer(
        trainer.model, TrainerConfig(batch_size=7, device="cpu", progress=False), trainer.train_loader
    )
    other.config.__dict__["output"] = tmp_path / "other"
    with pytest.raises(ValueError, match="gives 4 sequences per step, but batch_size is 7"):
        other.fit()


def test_a_run_is_not_overwritten(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", steps=2).fit()
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run"):
        make_trainer(tmp_path / "run", steps=2).fit()
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_log_lines_are_json_and_sparse_on_request(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", steps=7, log_every=3, validation_every=0).fit()
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert steps == [3, 6, 7]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_model_trains_alike(
    make_trainer: Make, tmp_path: Path, log_of: Log, toy: ModuleType
) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = build_model({**toy.MODEL, "dropout": 0.0})
        make_trainer(tmp_path / str(compiled), steps=3, model=model, compile=compiled).fit()
        losses.append([r["loss"] for r in log_of(tmp_path / str(compiled)) if r["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
