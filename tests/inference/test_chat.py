"""The conversation loop, with scripted input and a model that plays its part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from openxlstm.inference import PLAIN, TRANSCRIPT, Chat, Generator, SamplingConfig


def talk(generator: Generator, lines: Sequence[str], **options) -> tuple[Chat, str]:
    feed, shown = iter([*lines, None]), []
    sampling = SamplingConfig(**({"temperature": 0, "max_new_tokens": 20} | options.pop("sampling", {})))
    chat = Chat(generator, sampling, read=lambda: next(feed), write=shown.append, **options)
    chat.run()
    return chat, "".join(shown)


@pytest.fixture
def play(scripted, byte_level):
    """A model that answers the first turn with " Hi" and the second with " Yo", then says the user's part."""
    first = TRANSCRIPT.opening + "User: one\nAssistant:"
    second = " Hi\nUser: two\nAssistant:"
    script = [9] * 400
    for before, answer in ((first, " Hi\nUser: x"), (first + second, " Yo\nUser: x")):
        start = len(byte_level.encode(before))
        script[start : start + len(answer)] = byte_level.encode(answer, bos=False)
    return Generator(scripted(script), byte_level)


def test_conversation_keeps_its_state(play, tokens_read):
    chat, shown = talk(play, ["one", "two"])
    assert shown == "Hi\nYo\n"
    expected = TRANSCRIPT.opening + "User: one\nAssistant: Hi\nUser: two\nAssistant: Yo"
    assert chat.session.text == expected
    assert tokens_read(chat.session.state) == len(expected)  # every token but the last, and the beginning


def test_undo_retry_reset(play):
    chat, shown = talk(play, ["one", "two", "/undo"])
    assert chat.session.text == TRANSCRIPT.opening + "User: one\nAssistant: Hi"
    chat, shown = talk(play, ["one", "two", "/retry"])
    assert shown == "Hi\nYo\nYo\n"
    chat, shown = talk(play, ["one", "/reset", "one"])
    assert shown == "Hi\nThe conversation is forgotten.\nHi\n"
    assert "no turn" in talk(play, ["/undo"])[1]
    assert "no turn" in talk(play, ["one", "/undo", "/undo"])[1]


def test_save_and_load(play, tmp_path):
    path = tmp_path / "talk"
    talk(play, ["one", f"/save {path}"])
    _, shown = talk(play, [f"/load {path}", "two"])
    assert shown.startswith("Took up the conversation")
    assert shown.endswith("Yo\n")


def test_mistakes_do_not_end_the_conversation(play, tmp_path):
    _, shown = talk(
        play, ["/load", f"/load {tmp_path / 'none'}", "/what", "/help", "  ", "one", "/quit", "two"]
    )
    assert "/load needs a file name" in shown
    assert "does not exist" in shown
    assert "unknown command '/what'" in shown
    assert "/retry" in shown
    assert shown.endswith("Hi\n")


def test_interrupt_ends_the_answer_only(play):
    lines, shown = iter(["one", "two", None]), []

    def write(text: str) -> None:
        shown.append(text)
        if text == "H":
            raise KeyboardInterrupt

    Chat(play, SamplingConfig(temperature=0, max_new_tokens=20), read=lambda: next(lines), write=write).run()
    assert "".join(shown).startswith("H\n")
    assert len(shown) > 2


def test_plain_template_and_slash(scripted, byte_level):
    generator = Generator(scripted([0, *byte_level.encode("/ok, {text} go on", bos=False)]), byte_level)
    chat, shown = talk(generator, ["//ok", ", {text}"], template=PLAIN, sampling={"max_new_tokens": 1})
    assert chat.session.text.startswith("/ok")
    assert chat.session.text[4:12] == ", {text}"
    assert len(shown.splitlines()) == 2
