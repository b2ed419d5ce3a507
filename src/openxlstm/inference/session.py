"""A text with a memory: feed it, let it continue, branch it, put it in a file, take it up again.

Invariants:

- ``state`` has read ``tokens[:consumed]``; before a decode step exactly one token is left to read.
- The context is the text that was given out: the end-of-text token and stop strings do not become part of it.
  When a stop string ends a text, the session returns to the state before the tokens that spelled it (states
  are values, so that is a matter of keeping a reference) and reads again what came before the stop string.
- A session taken up from a file, or a fork, continues with exactly the tokens that the original would have
  written, random numbers, repetition penalty and held-back text included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from openxlstm.config import config_from_dict, config_to_dict
from openxlstm.inference.continuation import Continuation, FinishReason, count_seen, encode_prompt
from openxlstm.inference.runner import ModelRunner, State
from openxlstm.inference.sampling import Sampler, SamplingConfig
from openxlstm.inference.text import TextStream
from openxlstm.state import ModelState, leaves, load_state, save_state

if TYPE_CHECKING:
    from openxlstm.checkpoint.tokenizer import Tokenizer

FORMAT = "openxlstm session 1"


class _Anchor(NamedTuple):
    """Where to return to when a stop string is found: ``tokens[:length]`` plus the text given out since."""

    state: State
    length: int
    text: str


class Session:
    """One text in progress over a model; made by ``Generator.start`` and ``Generator.resume``.

    Args:
        runner: runs the model.
        tokenizer: text to tokens and back; ``None`` for token ids only.
        config: how tokens are chosen, until changed by a call.

    Attributes:
        tokens: everything read and written so far.
        finish_reason: why the last :meth:`stream` ended; ``None`` if it did not, or was left early.
    """

    def __init__(
        self, runner: ModelRunner, tokenizer: Tokenizer | None, config: SamplingConfig | None = None
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.tokens: list[int] = []
        self.consumed = 0
        self._state: State = runner.initial_state()
        self.sampler = Sampler(config or SamplingConfig(), runner.vocab_size)
        self.finish_reason: FinishReason | None = None
        self._text = TextStream(tokenizer)
        self._anchor: _Anchor | None = None

    @property
    def config(self) -> SamplingConfig:
        """How tokens are chosen, unless a call says otherwise."""
        return self.sampler.config

    @property
    def state(self) -> ModelState:
        """What the model remembers, a copy; it has read all tokens but those fed or written last."""
        return self.runner.release(self._state)

    @property
    def text(self) -> str:
        """The whole text so far, prompt included. Needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer to turn the session's tokens into text")
        return self.tokenizer.decode(self.tokens)

    def feed(self, prompt: str | Iterable[int], *, bos: bool | None = None) -> None:
        """Read more text. What the last :meth:`stream` may have held back is dropped (see :meth:`flush`).

        Args:
            prompt: text or token ids.
            bos: begin with the beginning-of-sequence token; ``None``: for text at the very beginning of the
                session, as the tokenizer says.

        Raises:
            ValueError: a token id that the model does not have, or see :func:`encode_prompt`.
        """
        if bos is None and self.tokens:
            bos = False
        ids = encode_prompt(self.tokenizer, prompt, bos)
        self.runner.check_tokens(ids)
        self.tokens += ids
        self._restart_text()
        self._read()

    def _restart_text(self) -> None:
        self.sampler.seen.zero_()
        count_seen(self.sampler, self.tokens, self.tokenizer)
        self._text = TextStream(self.tokenizer, self.tokens)
        self._anchor = None

    def _read(self) -> None:
        """Read everything but the last token."""
        for piece in self.runner.pieces(self.tokens[self.consumed : -1]):
            self._state = self.runner.read(piece, self.runner.release(self._state))
            self.consumed += len(piece)

    def stream(self, sampling: SamplingConfig | None = None, **options: Any) -> Iterator[str]:
        """Continue the text, piece by piece.

        When it ends by ``max_new_tokens``, or the iteration is abandoned, the next call goes on exactly as if
        there had been no break: text held back (half a character, the possible beginning of a stop string)
        comes with its pieces. :meth:`flush` gives it out at once.

        Args:
            sampling: replaces :attr:`config` from now on.
            **options: fields of :class:`SamplingConfig` to change from now on. A ``seed``, here or in
                ``sampling``, starts the random numbers afresh; without one they go on.

        Yields:
            non-empty pieces of text.

        Raises:
            ValueError: nothing was fed yet, wrong options, or stop strings without a tokenizer.
        """
        config = (sampling or self.config).updated(**options)
        check_config(config, self.tokenizer)
        if not self.tokens:
            raise ValueError(
                "there is nothing to continue: the prompt is empty and the tokenizer adds no "
                "beginning-of-sequence token. Give a prompt"
            )
        self.sampler.config = config
        if config.seed is not None and (sampling is not None or "seed" in options):
            self.sampler.reseed(config.seed)
        self._text.set_stop(config.stop)
        return self._stream()

    def _stream(self) -> Iterator[str]:
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        run = Continuation(self.tokens, self.sampler, self._text, eos_id)
        self.finish_reason = run.finish_reason
        self._read()
        self._state = self.runner.hold(self._state)
        while run.finish_reason is None:
            if self._text.settled and self.config.stop:
                self._anchor = _Anchor(self._state, len(self.tokens), "")
            logits, state = self.runner.advance(self.tokens[-1:], self._state)
            piece = run.accept(logits[0])
            if run.finish_reason != "eos":
                self._state, self.consumed = state, self.consumed + 1
            if self._anchor is not None:
                self._anchor = self._anchor._replace(text=self._anchor.text + piece)
            if run.finish_reason == "stop":
                self._return_to_anchor()
            if self._text.settled:
                self._anchor = None
            self.finish_reason = run.finish_reason
            if piece:
                yield piece
        if run.finish_reason == "eos" and (piece := self.flush()):
            yield piece

    def _return_to_anchor(self) -> None:
        anchor = self._anchor
        if anchor is None or self.tokenizer is None:
            return
        kept = self.tokenizer.encode(anchor.text, bos=False)
        self.tokens[anchor.length :] = kept
        self._state, self.consumed = anchor.state, anchor.length - 1
        self._restart_text()
        self._read()

    def flush(self) -> str:
        """Give out the text that was held back so far."""
        piece, stopped = self._text.flush()
        if stopped:
            self.finish_reason = "stop"
        self._anchor = None
        return piece

    def generate(self, sampling: SamplingConfig | None = None, **options: Any) -> str:
        """:meth:`stream` and :meth:`flush` joined into one text."""
        return "".join(self.stream(sampling, **options)) + self.flush()

    def fork(self, *, seed: int | None = None) -> Session:
        """A branch: continues like this session, independently of it, at no cost.

        Args:
            seed: start the branch's random numbers from this seed, so that branches differ.
        """
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin.tokens = list(self.tokens)
        twin.sampler = self.sampler.copy()
        twin._text = TextStream(self.tokenizer, self.tokens, self.config.stop, self._text.held)
        twin._text.settled = self._text.settled
        if seed is not None:
            twin.sampler.reseed(seed)
        return twin

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, atomically. The model is not part of it.

        Raises:
            OSError: the file cannot be written.
        """
        anchor = None if self._text.settled else self._anchor
        about = {
            "format": FORMAT,
            "architecture": self.runner.architecture(),
            "weights": self.runner.weights(),
            "sampling": config_to_dict(self.config),
            "seed": self.sampler.seed,
            "consumed": self.consumed,
            "finish_reason": self.finish_reason,
            "held": self._text.held,
            "settled": self._text.settled,
            "anchor": None if anchor is None else [anchor.length, anchor.text],
        }
        tree = (
            self.state,
            () if anchor is None else self.runner.release(anchor.state),
            torch.tensor(self.tokens, dtype=torch.long),
            self.sampler.generator.get_state(),
            torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
        )
        try:
            save_state(tree, path)
        except OSError:
            raise
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise OSError(f"cannot write the session to '{path}': {error}") from None

    @classmethod
    def load(cls, path: str | Path, runner: ModelRunner, tokenizer: Tokenizer | None) -> Session:
        """Take up a session that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a session, or belongs to another model.
        """
        tree = load_state(path, runner.device)
        try:
            state, anchor_state, tokens, random_state, encoded = tree
            about = json.loads(bytes(encoded.tolist()))
            if about["format"] != FORMAT:
                raise ValueError
            config = config_from_dict(SamplingConfig, about["sampling"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"'{path}' is not a saved session (of this version of openxlstm)") from None
        if about["architecture"] != runner.architecture():
            raise ValueError(
                f"the session in '{path}' belongs to another model: the shapes of its weights differ"
            )
        if about["weights"] != runner.weights():
            raise ValueError(
                f"the session in '{path}' belongs to another model: same shapes, but other weights "
                "(trained further, perhaps)"
            )
        session = cls(runner, tokenizer, config)
        if [t.shape for t in leaves(state)] != [t.shape for t in leaves(session.state)]:
            raise ValueError(f"the session in '{path}' is damaged: its state does not fit the model")
        session.tokens = tokens.tolist()
        session._state, session.consumed = state, about["consumed"]
        session.finish_reason = about["finish_reason"]
        session._restart_text()
        session._text = TextStream(tokenizer, session.tokens, config.stop, about["held"])
        session._text.settled = about["settled"]
        session.sampler.seed = about["seed"]
        session.sampler.generator.set_state(random_state.cpu())
        if about["anchor"] is not None:
            session._anchor = _Anchor(anchor_state, *about["anchor"])
        return session


def check_config(config: SamplingConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse what cannot work without a tokenizer.

    Raises:
        ValueError: stop strings without a tokenizer.
    """
    if config.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
