"""``openxlstm bench``: measures, prints the bound beside the figure, refuses what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from openxlstm.checkpoint import save_pretrained
from openxlstm.cli import bench
from openxlstm.inference import measurement
from openxlstm.inference.engine import DecodeEngine
from openxlstm.models import build_model, xLSTMLargeConfig
from openxlstm.ops.native import loader


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := loader.unavailable()) is not None:
        pytest.skip(reason)
    config = xLSTMLargeConfig(embedding_dim=64, num_heads=2, num_blocks=2, vocab_size=300)
    monkeypatch.setitem(bench.SIZES, "xlstm-160m", config)
    monkeypatch.setattr(measurement, "PROBE_BYTES", 1 << 20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_random_weights(cli: Callable, dtype: str) -> None:
    options = ("--random-weights", "--dtype", dtype, "--seconds", "0.05", "--batch", "3", "--context", "20")
    code, out, _ = cli("bench", "xlstm-160m", *options)
    assert code == 0
    assert f"xlstm-160m, {dtype}, batch 3, after 20 tokens" in out
    assert "of the bound, median of" in out
    report = json.loads(cli("bench", "xlstm-160m", *options, "--json").out)
    assert report["tokens_per_second"] == pytest.approx(3 / report["step_seconds"])
    assert report["bound_tokens_per_second"] > 0


def test_checkpoint(cli: Callable, tmp_path: Path) -> None:
    values = {
        "model_type": "xlstm_lm",
        "embedding_dim": 32,
        "num_blocks": 2,
        "vocab_size": 50,
        "slstm_at": [1],
    }
    save_pretrained(build_model(values), tmp_path / "model")
    for extra in ((), ("--dtype", "int8"), ("--dtype", "bf16", "--state-dtype", "bf16")):
        assert cli("bench", tmp_path / "model", "--seconds", "0.05", *extra).code == 0


def test_other_spellings(cli: Callable) -> None:
    for model in (("--model", "xlstm-160m"), ("--model=xlstm-160m",), ("xlstm-160m",)):
        out = cli("bench", *model, "--random-weights", "--dtype", "bf16", "--seconds", "0.05").out
        assert "xlstm-160m, bfloat16, batch 1" in out


def test_bytes_of_a_step() -> None:
    """Everything but the embedding, or everything where it is also the head."""
    values = {"model_type": "xlstm_large", "embedding_dim": 64, "num_heads": 2, "num_blocks": 1}
    for tied in (False, True):
        model = build_model(values | {"vocab_size": 100, "tie_word_embeddings": tied})
        total = sum(p.nbytes for p in model.parameters())
        assert measurement.weight_bytes(model) == total - (0 if tied else 100 * 64 * 4)
    held = DecodeEngine(model).open(rows=3)
    assert measurement.state_bytes(held) == 3 * 4 * (2 * (16 * 32 + 16 + 1))


def test_a_busy_machine_is_noticed(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(((0.0, 0.0), (100.0, 1.0)))
    monkeypatch.setattr(measurement, "cpu_seconds", lambda: next(seconds))
    out = cli("bench", "xlstm-160m", "--random-weights", "--seconds", "0.05").out
    assert "the machine is busy" in out


def test_what_it_refuses(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*words: str) -> str:
        code, _, err = cli("bench", *words)
        assert code == 2
        return err

    assert "add --random-weights" in mistake("xlstm-160m")
    assert "no published size 'xlstm-7' for" in mistake("xlstm-7", "--random-weights")
    assert "--batch must be positive, got 0" in mistake("xlstm-160m", "--batch", "0")
    assert "--context must not be negative" in mistake("xlstm-160m", "--context", "-1")
    wrong = mistake("xlstm-160m", "--dtype", "float16")
    assert "--dtype must be one of float32, bfloat16, int8, int4, got 'float16'" in wrong
    assert "--state-dtype must be one of float32, bfloat16" in mistake("xlstm-160m", "--state-dtype", "int8")
    monkeypatch.setattr(bench, "available_memory", lambda: 1 << 20)
    err = mistake("xlstm-7b", "--random-weights", "--dtype", "int4")
    assert "xlstm-7b in int4 with 1 sequences needs" in err
    assert "choose a smaller type" in err
