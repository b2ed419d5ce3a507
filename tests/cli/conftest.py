"""A tiny corpus, its shards, a tiny model with tokenizer, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from openxlstm.checkpoint import byte_tokenizer, save_pretrained
from openxlstm.cli.main import main
from openxlstm.data import Texts, prepare
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``openxlstm`` with the given words in this process."""

    def run(*words: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def mistake(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must fail with one clear line; returns the line."""

    def run(*words: str | Path, code: Sequence[int] = (1, 2)) -> str:
        result = cli(*words)
        assert result.code in code, result
        lines = [line for line in result.err.splitlines() if line.strip()]
        assert len(lines) == 1, result.err
        assert lines[0].startswith("openxlstm: error: ")
        assert "Traceback" not in result.err + result.out
        return lines[0].removeprefix("openxlstm: error: ")

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data in bytes: 40 short documents."""
    directory = tmp_path_factory.mktemp("cli") / "data"
    texts = [f"document {n}: the quick brown fox jumps over {n * n} lazy dogs.\n" * 3 for n in range(40)]
    prepare(Texts(texts), directory, byte_tokenizer(), validation_fraction=0.2, progress=False)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved xLSTMLarge with random weights and a tokenizer of bytes."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("cli") / "model"
    config = xLSTMLargeConfig(embedding_dim=32, num_heads=2, num_blocks=1, vocab_size=257)
    save_pretrained(xLSTMLarge(config), directory, tokenizer=byte_tokenizer())
    return directory


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    """A recipe that trains in a second or two."""
    values = {
        "model": {
            "model_type": "xlstm_lm",
            "embedding_dim": 32,
            "num_blocks": 2,
            "slstm_at": [1],
            "mlstm_block": {"mlstm": {"num_heads": 2}},
            "slstm_block": {"slstm": {"num_heads": 2}},
        },
        "data": {"path": str(shards), "context_length": 16},
        "train": {
            "steps": 2,
            "batch_size": 2,
            "precision": "float32",
            "validation_every": 2,
            "validation_batches": 1,
            "sample_every": 0,
            "tensorboard": False,
            "progress": False,
            "device": "cpu",
            "output": str(tmp_path / "run"),
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
