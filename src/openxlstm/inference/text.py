"""Tokens to text while they arrive, with stop strings.

Two things make streaming text harder than decoding it: a token may end inside a character, and a stop string
may be spread over several tokens. Both are solved by holding text back: :class:`TextStream` gives out a piece
only when it is certain to be complete and not to be the beginning of a stop string. The concatenated pieces
do not depend on how the text was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openxlstm.checkpoint.tokenizer import Tokenizer

CONTEXT_TOKENS = 16
"""Tokens before the new ones that a decoder is shown: spacing and characters may depend on them."""


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    The match is the one that is complete first (the longest of several that end at the same character), just
    as if the text came character by character.

    Args:
        stop: the stop strings; none: everything passes straight through.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.held = ""
        """Text that may be the beginning of a stop string."""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text. Returns what can be given out, and whether a stop string was found (it ends there)."""
        text = self.held + text
        matches = [(start + len(s), start) for s in self.stop if (start := text.find(s)) >= 0]
        if matches:
            self.held = ""
            return text[: min(matches)[1]], True
        keep = max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Give up what was held back."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one sequence: incremental decoding and stop strings.

    Args:
        tokenizer: gives the decoder; ``None``: no text at all.
        context: the tokens before; only the last few matter.
        stop: the stop strings.
        held: text that an earlier stream over the same sequence held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        held: str = "",
    ) -> None:
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._matcher = StopMatcher(stop)
        self._matcher.held = held
        for token in context[-CONTEXT_TOKENS:]:
            self._decode(token)
        self.settled = not held
        """True when the text of all tokens so far has been given out."""

    @property
    def held(self) -> str:
        """Text that may be the beginning of a stop string."""
        return self._matcher.held

    def set_stop(self, stop: Sequence[str]) -> None:
        """Use other stop strings from the next token on."""
        self._matcher.stop = tuple(stop)

    def _decode(self, token: int) -> str:
        return "" if self._decoder is None else self._decoder.push(token)

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token. Returns the text that is now certain, and whether a stop string ended it."""
        text = self._decode(token)
        given, stopped = self._matcher.push(text)
        self.settled = bool(text) and not self._matcher.held
        return given, stopped

    def flush(self) -> tuple[str, bool]:
        """End the sequence: returns what was held back (up to a stop string, should it complete one)."""
        given, stopped = self._matcher.push("" if self._decoder is None else self._decoder.flush())
        self.settled = True
        return (given, True) if stopped else (given + self._matcher.flush(), False)
