"""Perplexity, bits per byte, and how far back tokens matter: against direct computation on whole texts."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from openxlstm.checkpoint import Tokenizer, byte_tokenizer, train_bpe
from openxlstm.data import Texts, prepare
from openxlstm.evaluation.context import (
    cut_rows,
    foreign_past,
    half_life,
    loss_by_context,
    loss_by_position,
)
from openxlstm.evaluation.mamba import MambaLM
from openxlstm.evaluation.text import (
    Document,
    Piece,
    prepared_documents,
    score_stream,
    score_windows,
    text_documents,
)
from openxlstm.models import LanguageModel, build_model

TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} dögs\n" for n in range(40))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 280)


@pytest.fixture
def model() -> LanguageModel:
    values = {
        "model_type": "xlstm_lm",
        "embedding_dim": 32,
        "num_blocks": 2,
        "slstm_at": [1],
        "vocab_size": 300,
    }
    return build_model(values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def direct_losses(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """Nats of all tokens but the first, from one forward pass over everything."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        return F.cross_entropy(model.eval()(row[:, :-1])[0], row[0, 1:], reduction="none").double()


def tokens_of(documents: Iterator[Document]) -> list[int]:
    return [token for document in documents for piece in document for token in piece.tokens]


@pytest.mark.parametrize("piece", [7, 100, 10_000])
def test_streamed_equals_the_whole(
    model: LanguageModel, tokenizer: Tokenizer, path: Path, piece: int
) -> None:
    model.train()
    score = score_stream(model, tokenizer, text_documents(path, tokenizer), piece=piece)
    assert model.training
    tokens = tokens_of(text_documents(path, tokenizer))
    assert tokenizer.decode(tokens) == TEXT
    losses = direct_losses(model, [tokenizer.bos_id or 0, *tokens])
    assert score.tokens == len(tokens)
    assert score.bytes == len(TEXT.encode())
    assert score.nats == pytest.approx(float(losses.sum()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(
        float(losses.sum()) / math.log(2) / len(TEXT.encode()), rel=1e-5
    )
    for first, loss, count in score.by_position:
        part = losses[first - 1 : 2 * first - 1]
        assert count == len(part)
        assert loss == pytest.approx(float(part.mean()), rel=1e-4)
    assert sum(count for _, _, count in score.by_position) == len(tokens)


def test_without_a_first_token(model: LanguageModel, tokenizer: Tokenizer, path: Path) -> None:
    tokenizer.add_bos = False
    tokens = tokens_of(text_documents(path, tokenizer))
    score = score_stream(model, tokenizer, text_documents(path, tokenizer), piece=50)
    assert score.nats == pytest.approx(float(direct_losses(model, tokens).sum()), rel=1e-5)
    assert score.tokens == len(tokens) - 1
    assert score.bytes == len(TEXT.encode()) - len(tokenizer.decode(tokens[:1]).encode())
    windows = score_windows(model, tokenizer, text_documents(path, tokenizer), window=len(tokens) - 1)
    assert windows[:4] == pytest.approx(score[:4], rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 17), (50, None), (33, 1)])
def test_windows_count_every_token_once(
    model: LanguageModel, tokenizer: Tokenizer, path: Path, window: int, stride: int | None
) -> None:
    tokens = [tokenizer.bos_id or 0, *tokens_of(text_documents(path, tokenizer))]
    score = score_windows(model, tokenizer, text_documents(path, tokenizer), window=window, stride=stride)
    step = stride or window // 2
    expected, done, start = 0.0, 0, 0
    while done < len(tokens) - 1:  # the definition: each token in the first window that holds it
        part = tokens[start : start + window + 1]
        losses = direct_losses(model, part)
        expected += float(losses[done - start :].sum())
        done, start = start + len(part) - 1, start + step
    assert score.tokens == len(tokens) - 1
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.bytes == len(TEXT.encode())


def test_many_documents(model: LanguageModel, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = [f"document {n} of several\n" * 3 for n in range(12)]
    prepare(Texts(texts), tmp_path / "data", tokenizer, validation_fraction=0.4, progress=False)
    documents = list(prepared_documents(tmp_path / "data"))
    score = score_stream(model, tokenizer, documents)
    assert score.documents == len(documents) > 1
    expected = 0.0
    for document in documents:
        tokens = [token for piece in document for token in piece.tokens]
        assert tokens[-1] == tokenizer.eos_id
        expected += float(direct_losses(model, [tokenizer.bos_id or 0, *tokens]).sum())
    assert score.nats == pytest.approx(expected, rel=1e-5)
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "texts" / f"{n:02}.txt").write_text(text)
    again = score_stream(model, tokenizer, text_documents(tmp_path / "texts", tokenizer))
    assert again.documents == 12
    assert again.bytes == sum(map(len, texts))
    part = score_stream(model, tokenizer, text_documents(tmp_path / "texts", tokenizer, max_tokens=100))
    assert part.tokens == part.bytes == 100


def test_what_cannot_be_scored(
    model: LanguageModel, tokenizer: Tokenizer, path: Path, tmp_path: Path
) -> None:
    documents = lambda: text_documents(path, tokenizer)  # noqa: E731
    count = len(tokens_of(documents()))
    with pytest.raises(
        ValueError, match=f"the text has {count} tokens, fewer than the window of 5000; use a window"
    ):
        score_windows(model, tokenizer, documents(), window=5000)
    with pytest.raises(ValueError, match="stride must lie between 1 and the window of 8 tokens, got 9"):
        score_windows(model, tokenizer, documents(), window=8, stride=9)
    with pytest.raises(ValueError, match="there is no text to score"):
        score_stream(model, tokenizer, [])
    with pytest.raises(ValueError, match="piece must be at least 1"):
        score_stream(model, tokenizer, documents(), piece=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        next(text_documents(path, tokenizer, max_tokens=0))
    with pytest.raises(FileNotFoundError):
        next(text_documents(tmp_path / "none", tokenizer))
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="a MambaLM has no step mode, so its state cannot be carried"):
        score_stream(MambaLM(300, 16, 1), tokenizer, documents())


def test_loss_by_position_and_context(model: LanguageModel) -> None:
    rows = cut_rows(torch.randint(300, (2000,)).tolist(), 300, 4)
    assert rows.shape == (4, 300)
    losses = loss_by_position(model, rows)
    direct = torch.stack([direct_losses(model, row.tolist()) for row in rows]).mean(0)
    assert torch.allclose(losses, direct, atol=1e-4)
    assert loss_by_position(model, rows, 0).shape == (300,)
    found = loss_by_context(model, rows, asked=20, tolerance=0.5)
    assert found.lengths == (1, 2, 4, 8, 16, 32, 64, 128, 256, 280)
    assert found.losses[-1] == pytest.approx(float(losses[-20:].mean()), rel=1e-4)
    assert found.effective == 1
    with pytest.raises(ValueError, match="the text has 10 tokens, fewer than the 300"):
        cut_rows([1] * 10, 300, 4)
    with pytest.raises(ValueError, match="no past before 300 asked"):
        loss_by_context(model, rows, asked=300)
    with pytest.raises(ValueError, match="between 1 and 280 tokens, got 1 to 400"):
        loss_by_context(model, rows, asked=20, lengths=[1, 400])


def test_a_wrong_past(model: LanguageModel) -> None:
    rows = torch.randint(300, (3, 120))
    found = foreign_past(model, rows[:, :40], rows[:, 40:])
    assert found.shape == (80,)
    assert (found > -1e-9).all()
    same = rows[:, :40][:1].expand(3, 40)
    assert foreign_past(model, same, rows[:, 40:]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="at least two rows"):
        foreign_past(model, rows[:1, :40], rows[:1, 40:])
    assert half_life(torch.tensor([4.0, 3.0, 2.0, 3.0])) == 3
    assert half_life(torch.ones(5)) is None


@pytest.mark.slow
def test_a_million_tokens_in_constant_memory() -> None:
    """Peak memory of the second half of a text of 1,000,000 tokens stays where the first half left it."""
    tokenizer = byte_tokenizer()
    values = {
        "model_type": "xlstm_lm",
        "embedding_dim": 32,
        "num_blocks": 2,
        "slstm_at": [1],
        "vocab_size": 257,
    }
    model = build_model(values)
    peaks: list[int] = []

    def document() -> Iterator[Piece]:
        for number in range(1000):
            if number in (100, 999):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            yield Piece([(number * 31 + n * n) % 256 for n in range(1000)], 1000)

    score = score_stream(model, tokenizer, [document()])
    assert score.tokens == 1_000_000
    assert math.isfinite(score.nats)
    assert peaks[1] - peaks[0] < 4096, peaks  # KiB
