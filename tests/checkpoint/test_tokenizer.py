"""Tokenizers: exact round trips, special tokens, streaming, files that transformers reads."""

from __future__ import annotations

import json
import pickle
import random
import time
import warnings
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from openxlstm.checkpoint.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n\n\n    # done\n",
    "The quick brown fox; the quick brown dog. the the the",
    "数学は楽しい。机器学习 🙂👩‍👩‍👧‍👦🇩🇪 naïve café",
    "",
    "   leading and trailing   ",
    "\x00\t\r\n\u2028 \ufffd",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS * 5, 320)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, byte_tokenizer()):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id == tokenizer.eos_id == 0
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "a"], bos=False) == [ids[1:], tokenizer.encode("a", bos=False)]


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text, bos=False) == [b + 1 for b in text.encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_are_text_unless_asked(bpe: Tokenizer) -> None:
    text = f"a{END_OF_TEXT}b"
    assert 0 not in bpe.encode(text, bos=False)
    assert bpe.decode(bpe.encode(text)) == text
    assert 0 in bpe.encode(text, bos=False, parse_special=True)
    assert bpe.decode(bpe.encode(text, bos=False, parse_special=True), skip_special=False) == text
    assert bpe.decode([0, *bpe.encode("x", bos=False), 0]) == "x"


@given(st.lists(st.integers(0, 400), max_size=60), st.booleans())
@settings(deadline=None, max_examples=300)
def test_streaming_equals_full_decode(ids: list[int], skip_special: bool) -> None:
    """Any ids at all: broken UTF-8, unknown ids, special tokens in the middle."""
    for tokenizer in (byte_tokenizer(), _BPE):
        stream = tokenizer.stream_decoder(skip_special=skip_special)
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


_BPE = train_bpe(TEXTS * 5, 320)


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_splits_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert [p for p in pieces if p] == list(text)
    assert stream.flush() == ""


def test_streaming_truncated_character_is_flushed() -> None:
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream_decoder()
    assert [stream.push(b + 1) for b in "🙂".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("a", bos=False)[0]) == "a"


def test_streaming_cost_is_linear() -> None:
    tokenizer = byte_tokenizer()
    stream = tokenizer.stream_decoder()
    ids = [random.Random(0).randrange(257) for _ in range(20_000)]
    started = time.perf_counter()
    for i in ids:
        stream.push(i)
    assert time.perf_counter() - started < 2.0


def _foreign() -> Tokenizer:
    """A vocabulary that is not byte-level: spacing depends on position, bytes fall back to <0x..> tokens."""
    pieces = ["▁", "▁hello", "▁world", "a", "b", "界"]
    vocabulary = {t: n for n, t in enumerate([END_OF_TEXT, *pieces, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def test_streaming_other_vocabularies() -> None:
    tokenizer = _foreign()
    number = tokenizer.backend.token_to_id
    for tokens in (
        ["▁hello", "▁world", "a", "▁", "b"],
        ["▁hello", END_OF_TEXT, "▁world"],
        ["a", *(f"<0x{b:02X}>" for b in "🙂é".encode()), "界", "▁world"],
        ["a", "<0xF0>"],
        [END_OF_TEXT] * 40 + ["▁hello"],
    ):
        ids = [number(t) for t in tokens]
        stream = tokenizer.stream_decoder()
        pieces = [stream.push(i) for i in ids]
        text = "".join(pieces) + stream.flush()
        assert text == tokenizer.decode(ids), tokens
        assert not any("\ufffd" in p for p in pieces)


def _neox(directory: Path) -> None:
    """A directory in the manner of the published models: special ids 0 and 1, added runs of spaces."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={
                END_OF_TEXT: 0,
                "<|padding|>": 1,
                **{c: n + 2 for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            },
            merges=[],
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT, "<|padding|>"])
    backend.add_tokens(["  ", "   "])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": {"content": END_OF_TEXT}}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))


def test_published_tokenizer(tmp_path: Path) -> None:
    _neox(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, 1, 260)
    ids = tokenizer.encode("a   b  c é")
    assert ids[0] == 0
    assert 258 in ids or 259 in ids
    assert tokenizer.decode(ids) == "a   b  c é"
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, ids)) == "a   b  c é"


def test_files(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.to_json() == bpe.to_json()
        assert [again.encode(t) for t in TEXTS] == [bpe.encode(t) for t in TEXTS]
    without = Tokenizer(bpe.backend, add_bos=False)
    without.save(tmp_path / "without")
    assert Tokenizer.load(tmp_path / "without").encode("") == []


def test_transformers_reads_it(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        for cls in (AutoTokenizer, PreTrainedTokenizerFast):
            theirs = cls.from_pretrained(tmp_path)
            for text in TEXTS:
                assert theirs(text)["input_ids"] == bpe.encode(text)
                assert theirs.decode(bpe.encode(text), skip_special_tokens=True) == text
            assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 0)


def test_training_is_deterministic_and_pickles(bpe: Tokenizer) -> None:
    assert train_bpe(iter(TEXTS * 5), 320).to_json() == bpe.to_json()
    copied = pickle.loads(pickle.dumps(bpe))
    assert copied.encode(END_OF_TEXT) == bpe.encode(END_OF_TEXT)
    assert copied.to_json() == bpe.to_json()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["a"], 256)
    with pytest.raises(ValueError, match="no text"):
        train_bpe(["", ""], 300)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="pad token 'x ' is not in"):
        Tokenizer(byte_tokenizer().backend, pad="x ")
    with pytest.raises(ValueError, match="valid Unicode"):
        byte_tokenizer().encode("a\ud800")
    nameless = Tokenizer(byte_tokenizer().backend, bos=None)
    assert nameless.encode("") == []
    with pytest.raises(ValueError, match="bos=False"):
        nameless.encode("", bos=True)
