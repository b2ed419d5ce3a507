"""Sessions: breaks, files and branches change nothing in what is written."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from openxlstm.inference import Generator, SamplingConfig
from openxlstm.state import leaves

SAMPLING: dict[str, Any] = {
    "temperature": 1.3,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "seed": 7,
    "stop_at_eos": False,
}


def test_save_and_resume_equals_uninterrupted(make_model, bpe, tmp_path):
    for kind in ("xlstm_lm", "xlstm_large"):
        prompt = "User: how are you? " * 3
        whole = Generator(make_model(kind), bpe, prefill_chunk=8).start(prompt, **SAMPLING)
        expected = whole.generate(max_new_tokens=30)

        session = Generator(make_model(kind), bpe, prefill_chunk=8).start(prompt, **SAMPLING)
        text = "".join(session.stream(max_new_tokens=11))
        session.save(tmp_path / "session")
        resumed = Generator(make_model(kind), bpe, prefill_chunk=8).resume(tmp_path / "session")
        text += resumed.generate(max_new_tokens=19)

        assert resumed.tokens == whole.tokens
        assert text == expected
        assert resumed.text == whole.text == prompt + expected
        assert resumed.sampler.seed == 7
        for mine, theirs in zip(leaves(resumed.state), leaves(whole.state), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("cut", range(1, 14))
def test_break_inside_characters_and_stop_strings(scripted, byte_level, tmp_path, tokens_read, cut):
    """Wherever the break falls, by length or by leaving the iteration, text and context are the same."""
    script = [0, *byte_level.encode("é\n\nUé\n\nUser more", bos=False)]
    options = {"temperature": 0, "stop": "\n\nUser"}
    generator = Generator(scripted(script), byte_level)

    session = generator.start("", **options)
    text = "".join(session.stream(max_new_tokens=cut))
    session.save(tmp_path / "session")
    for taken_up in (session.fork(), generator.resume(tmp_path / "session"), session):
        rest = taken_up.generate(max_new_tokens=100)
        assert text + rest == "é\n\nUé"
        assert taken_up.finish_reason == "stop"
        assert taken_up.text == "é\n\nUé"
        assert taken_up.tokens == byte_level.encode("é\n\nUé")
        assert tokens_read(taken_up.state) == len(taken_up.tokens) - 1


def test_leaving_the_iteration_loses_nothing(model, bpe):
    expected = Generator(model, bpe).start("User:", **SAMPLING).generate(max_new_tokens=40)
    session = Generator(model, bpe).start("User:", **SAMPLING)
    text = ""
    for piece in session.stream(max_new_tokens=40):
        text += piece
        if len(text) > 5:
            break
    assert session.finish_reason is None
    written = len(session.tokens) - len(bpe.encode("User:"))
    assert text + session.generate(max_new_tokens=40 - written) == expected


def test_after_the_end_of_text_the_context_is_the_text(scripted, byte_level, tokens_read):
    script = [0, *byte_level.encode("ab", bos=False), 0, 7, *byte_level.encode("cd", bos=False), 0]
    session = Generator(scripted(script), byte_level).start("", temperature=0)
    assert session.generate() == "ab"
    assert session.finish_reason == "eos"
    assert session.tokens == byte_level.encode("ab")
    assert tokens_read(session.state) == 2
    assert session.generate() == ""  # nothing was added: still the end
    session.feed("xy")
    assert session.tokens == byte_level.encode("abxy")  # and no second beginning of sequence
    assert session.generate() == "cd"


def test_state_is_carried_not_recomputed(model, bpe):
    """Feeding in two parts is reading the whole."""
    parts = Generator(model, bpe).start("the quick brown ")
    parts.feed("fox jumps")
    whole = Generator(model, bpe).start(list(parts.tokens))
    assert parts.generate(temperature=0, max_new_tokens=10) == whole.generate(
        temperature=0, max_new_tokens=10
    )


def test_forks_are_independent(model, bpe):
    session = Generator(model, bpe).start("User:", **SAMPLING)
    "".join(session.stream(max_new_tokens=5))
    same, other = session.fork(), session.fork(seed=99)
    expected = Generator(model, bpe).start("User:", **SAMPLING)
    "".join(expected.stream(max_new_tokens=5))
    text = expected.generate(max_new_tokens=20)
    different = other.generate(max_new_tokens=20)
    assert same.generate(max_new_tokens=20) == text
    assert different != text
    assert session.generate(max_new_tokens=20) == text


def test_options_stay_and_seed_starts_afresh(model, bpe):
    session = Generator(model, bpe).start("User:", SamplingConfig(**SAMPLING))
    session.stream(max_new_tokens=3, temperature=0.5)
    assert session.config == SamplingConfig(**SAMPLING).updated(max_new_tokens=3, temperature=0.5)
    one, two = session.fork(), session.fork()
    two.generate(max_new_tokens=4)
    start = len(session.tokens)
    one.generate(seed=5)
    assert len(one.tokens) == start + 3
    again = session.fork()
    again.generate(seed=5)
    assert again.tokens == one.tokens


def test_other_model_is_refused(make_model, bpe, tmp_path):
    path = tmp_path / "session"
    Generator(make_model("xlstm_lm"), bpe).start("User: hello").save(path)
    with pytest.raises(ValueError, match="another model: the shapes"):
        Generator(make_model("xlstm_large"), bpe).resume(path)
    with pytest.raises(ValueError, match="another model: same shapes, but other weights"):
        Generator(make_model("xlstm_lm", seed=1), bpe).resume(path)
    assert Generator(make_model("xlstm_lm").double(), bpe).resume(path).tokens


def test_files_that_are_no_sessions(model, bpe, tmp_path):
    generator = Generator(model, bpe)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        generator.resume(tmp_path / "missing")
    session = generator.start("User")
    session.state.save(tmp_path / "state")
    save_file({"x": torch.zeros(3)}, tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    session.save(tmp_path / "good")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    for name in ("state", "other", "text", "cut"):
        with pytest.raises(ValueError, match=name):
            generator.resume(tmp_path / name)
    with pytest.raises(OSError, match="missing"):
        session.save(tmp_path / "missing" / "session")
    session.feed(" more")
    session.save(tmp_path / "good")  # replaces
    assert generator.resume(tmp_path / "good").text == "User more"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "good", "other", "state", "text"]


def test_full_disk(model, bpe, tmp_path, monkeypatch):
    session = Generator(model, bpe).start("User")
    session.save(tmp_path / "session")
    before = (tmp_path / "session").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    session.feed(" more")
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "session")
    assert (tmp_path / "session").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_continue(model, bpe):
    with pytest.raises(ValueError, match="nothing to continue"):
        Generator(model, bpe).start().stream()
    session = Generator(model, bpe).start()
    with pytest.raises(ValueError, match="out of range"):
        session.feed([10_000])
    assert session.tokens == []
    session.feed("", bos=True)
    assert session.tokens == [0]
