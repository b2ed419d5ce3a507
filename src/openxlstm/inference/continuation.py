"""One text while it is being written: choosing tokens, giving out text, knowing when to end.

The drivers (one sequence in :mod:`~openxlstm.inference.session`, a batch in
:mod:`~openxlstm.inference.generator`) run the model; what happens to a row's logits is the same for both and
stands here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from openxlstm.inference.sampling import Sampler, SamplingConfig
from openxlstm.inference.text import TextStream
from openxlstm.runtime import one_thread

if TYPE_CHECKING:
    from openxlstm.checkpoint.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
"""Why a text ended: the end-of-text token, a stop string, or ``max_new_tokens``."""


def encode_prompt(tokenizer: Tokenizer | None, prompt: str | Iterable[int], bos: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: may be ``None`` for prompts that are ids already.
        prompt: text or token ids.
        bos: begin with the beginning-of-sequence token; ``None``: for text as the tokenizer says (published
            models need it), for ids no. Never doubled.

    Raises:
        ValueError: text without a tokenizer, ``bos=True`` without such a token, or not a prompt at all.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("there is no tokenizer: pass the prompt as token ids, or load a tokenizer")
        return tokenizer.encode(prompt, bos=bos)
    try:
        if isinstance(prompt, (bytes, bytearray)):
            raise TypeError("bytes are neither")
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"a prompt is a text or a list of token ids (whole numbers), got {prompt!r:.80}"
        ) from None
    if bos:
        bos_id = None if tokenizer is None else tokenizer.bos_id
        if bos_id is None:
            raise ValueError("there is no beginning-of-sequence token; call with bos=False")
        if ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
    return ids


def count_seen(sampler: Sampler, tokens: Sequence[int], tokenizer: Tokenizer | None) -> None:
    """Tell the sampler which tokens the text holds; the beginning-of-sequence token is not text."""
    skip = 0 if tokenizer is None or tokenizer.bos_id is None or list(tokens[:1]) != [tokenizer.bos_id] else 1
    sampler.observe(*tokens[skip:])


class Continuation:
    """The next stretch of one text, until it ends.

    Args:
        tokens: the text so far; accepted tokens are appended to this list.
        sampler: draws the tokens; its configuration says when to end.
        text: turns tokens into text.
        eos_id: the end-of-text token, if there is one.

    Attributes:
        finish_reason: ``None`` while the text goes on.
        logprobs: log-probability of every accepted token under the model itself (temperature 1, no filters).
    """

    def __init__(self, tokens: list[int], sampler: Sampler, text: TextStream, eos_id: int | None) -> None:
        self.tokens, self.sampler, self.text = tokens, sampler, text
        self.eos_id = eos_id if sampler.config.stop_at_eos else None
        self.remaining = sampler.config.max_new_tokens
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None if self.remaining else "length"

    @property
    def config(self) -> SamplingConfig:
        """How tokens are chosen."""
        return self.sampler.config

    def accept(self, logits: Tensor) -> str:
        """Choose the next token from ``logits`` (V,) and return the text that is certain now.

        The end-of-text token ends the text without becoming part of it.
        """
        with one_thread():
            token = self.sampler.draw(logits)
            if token == self.eos_id:
                self.finish_reason = "eos"
                return ""
            self.tokens.append(token)
            self.sampler.observe(token)
            values = logits.float()
            self.logprobs.append(float(values[token] - values.logsumexp(dim=-1)))
        self.remaining -= 1
        piece, stopped = self.text.push(token)
        if stopped:
            self.finish_reason = "stop"
        elif self.remaining == 0:
            self.finish_reason = "length"
        return piece

    def flush(self) -> str:
        """The text that was held back, at the end (a stop string may still end it)."""
        piece, stopped = self.text.flush()
        if stopped:
            self.finish_reason = "stop"
        return piece
