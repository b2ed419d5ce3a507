"""Corpus: the split, the digest, the errors."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from openxlstm import data
from openxlstm.data import Texts, open_corpus


def test_split_is_by_document_and_close_to_the_fraction(texts: list[str]) -> None:
    corpus = open_corpus(Texts(texts), validation_fraction=0.2)
    documents = list(corpus.read())
    assert [d.text for d in documents] == texts
    assert corpus.documents == len(texts)
    assert corpus.text_bytes == sum(len(t.encode()) for t in texts) == sum(d.size for d in documents)
    held_out = sum(d.size for d in documents if d.split == "validation")
    assert abs(held_out / corpus.text_bytes - 0.2) < 0.02
    assert list(corpus.texts("train")) == [d.text for d in documents if d.split == "train"]
    assert set(corpus.texts("train")).isdisjoint(corpus.texts("validation"))  # also for equal documents


def test_split_does_not_depend_on_order_but_the_digest_does(texts: list[str]) -> None:
    shuffled = random.Random(0).sample(texts, len(texts))
    a, b = open_corpus(Texts(texts)), open_corpus(Texts(shuffled))
    assert sorted(a.texts("validation")) == sorted(b.texts("validation"))
    assert a.threshold == b.threshold
    assert a.digest != b.digest
    assert a.digest == open_corpus([Texts(texts[:7]), Texts(texts[7:])]).digest


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_both_splits_have_text(fraction: float) -> None:
    corpus = open_corpus(Texts(["one", "two"]), validation_fraction=fraction)
    assert len(list(corpus.texts("train"))) == len(list(corpus.texts("validation"))) == 1


def test_separate_validation_sources(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train text")
    (tmp_path / "valid.txt").write_text("valid text")
    corpus = open_corpus(tmp_path / "train.txt", validation_sources=tmp_path / "valid.txt")
    assert list(corpus.texts("train")) == ["train text"]
    assert list(corpus.texts("validation")) == ["valid text"]
    together = open_corpus([tmp_path / "train.txt", tmp_path / "valid.txt"])
    assert corpus.digest != together.digest


def test_several_paths_of_different_kinds(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f.py").write_text("in a directory")
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_text('{"body": "a line"}')
    corpus = open_corpus(
        [tmp_path / "b.jsonl", str(tmp_path / "d"), tmp_path / "a.txt"],
        text_field="body",
        validation_fraction=0,
    )
    assert list(corpus.texts("train")) == ["a line", "in a directory", "a text"]
    assert list(corpus.texts("validation")) == []


def test_a_corpus_that_changes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    corpus = open_corpus(tmp_path / "a.txt", validation_fraction=0)
    (tmp_path / "a.txt").write_text("after")
    with pytest.raises(ValueError, match="corpus has changed"):
        list(corpus.read())


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing' does not exist"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(ValueError, match="corpus is empty: no text in"):
        open_corpus(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"corpus is empty: no text in '.*empty\.txt'"):
        open_corpus(tmp_path / "empty.txt")
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"left out: 1 binary, 1 empty"):
        open_corpus(tmp_path)
    with pytest.raises(ValueError, match="no corpus given"):
        open_corpus([])
    with pytest.raises(ValueError, match="single document"):
        open_corpus(Texts(["one", "one"]))
    with pytest.raises(ValueError, match="corpus is empty"):
        open_corpus(Texts(["one"]), validation_sources=Texts([]))
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction must be at least 0 and less than 1"):
            open_corpus(Texts(["one", "two"]), validation_fraction=fraction)
    with pytest.raises(ValueError, match="not both"):
        open_corpus(Texts(["one"]), validation_fraction=0.1, validation_sources=Texts(["two"]))
    with pytest.raises(ValueError, match="no split 'test'"):
        open_corpus(Texts(["one", "two"])).texts("test")


def test_public_names() -> None:
    assert all(getattr(data, name).__name__ == name for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Loader'"):
        data.Loader  # noqa: B018
