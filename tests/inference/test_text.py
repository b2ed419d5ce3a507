"""Stop strings and streaming text do not depend on how the text is cut."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.inference.text import StopMatcher, TextStream

SMALL = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(SMALL, STOPS, st.lists(st.integers(0, 20), max_size=8))
@settings(max_examples=500, deadline=None)
def test_stop_strings_split_anywhere(text, stops, places):
    matcher, given_out, stopped = StopMatcher(stops), "", False
    expected, expected_stopped = reference(text, stops)
    for piece in cut(text, places):
        out, stopped = matcher.push(piece)
        given_out += out
        assert expected.startswith(given_out)  # never more than will be certain
        if stopped:
            break
    if not stopped:
        # held back is exactly what could still become a stop string
        assert matcher.held == "" or any(s.startswith(matcher.held) for s in stops)
        given_out += matcher.flush()
    assert (given_out, stopped) == (expected, expected_stopped)


@given(st.text(max_size=30), st.text(min_size=1, max_size=3), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_tokens_of_unicode_text_with_a_stop_string(byte_level, text, stop, place):
    """One byte per token: characters and stop strings are both spread over tokens."""
    place %= len(text) + 1
    text = text[:place] + stop + text[place:]
    stream, pieces, stopped = TextStream(byte_level, stop=[stop]), "", False
    for token in byte_level.encode(text, bos=False):
        piece, stopped = stream.push(token)
        assert "\ufffd" not in piece or "\ufffd" in text
        pieces += piece
        if stopped:
            break
    assert stopped
    assert pieces == text[: text.index(stop)]


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_stream_without_stop_is_the_text(bpe, text):
    stream = TextStream(bpe, context=bpe.encode("User: ", bos=True))
    pieces = "".join(stream.push(token)[0] for token in bpe.encode(text, bos=False))
    assert pieces + stream.flush()[0] == text


def test_half_a_character_is_held_until_the_end(byte_level):
    stream = TextStream(byte_level)
    assert [stream.push(1 + byte)[0] for byte in "é!".encode()] == ["", "é", "!"]
    stream = TextStream(byte_level)
    assert stream.push(1 + "é".encode()[0]) == ("", False)
    assert not stream.settled
    assert stream.flush() == ("\ufffd", False)


def test_no_tokenizer_no_text():
    stream = TextStream(None)
    assert stream.push(5) == ("", False)
    assert stream.flush() == ("", False)
