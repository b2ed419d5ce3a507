"""Fixtures: small prepared directories."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from openxlstm.checkpoint.tokenizer import byte_tokenizer
from openxlstm.data import Texts, TokenDataset, prepare

PIECES = [
    "def f(x):\n",
    "    return x\n",
    "naïve ",
    "数学",
    "🙂",
    "<|endoftext|>",
    "\r\n",
    "word ",
    "\t",
    "0123456789",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """120 documents of 1 to a few hundred characters, of many scripts."""
    generator = random.Random(5)
    return ["".join(generator.choices(PIECES, k=generator.choice([1, 2, 5, 30, 60]))) for _ in range(120)]


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[..., TokenDataset]:
    """Prepare texts with the byte tokenizer, all for training, and open them."""

    def make(texts: list[str], shard_tokens: int = 1000) -> TokenDataset:
        directory = tmp_path / "prepared"
        prepare(
            Texts(texts),
            directory,
            byte_tokenizer(),
            validation_fraction=0,
            shard_tokens=shard_tokens,
            progress=False,
        )
        return TokenDataset.open(directory)

    return make
