"""Text from a language model: one prompt streamed, or many prompts in a batch.

Batches and what holds in them:

- Every prompt is read alone, then the states are stacked and the rows step together. No padding exists, so
  prompts of different lengths cannot influence each other.
- A row's result depends on its prompt, its options and the *number* of rows that step with it, never on what
  they contain, bit for bit: a row that ends early keeps its place until its own ``max_new_tokens`` is
  used up (or all rows have ended), because leaving would change the shape of the others' matrix products, and
  with it their rounding, at a moment that depends on its content. For the same reason prompts are read alone.
- Alone and in a batch, a row agrees to rounding error, hence in greedy tokens (ties within rounding aside).
  With the native decode engine, the default on CPUs, it agrees bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from torch import Tensor, nn

from openxlstm.inference.continuation import Continuation, FinishReason, count_seen, encode_prompt
from openxlstm.inference.runner import ModelRunner
from openxlstm.inference.sampling import Sampler, SamplingConfig
from openxlstm.inference.session import Session, check_config
from openxlstm.inference.text import TextStream
from openxlstm.state import ModelState

if TYPE_CHECKING:
    from openxlstm.checkpoint.tokenizer import Tokenizer

Prompt = str | Iterable[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class GenerationResult:
    """What was written for one prompt."""

    text: str
    """The new text, without stop string."""
    tokens: list[int]
    """The new tokens, without end-of-text token; those that spelled a stop string are included."""
    logprobs: list[float]
    """Log-probability of each of ``tokens`` under the model itself (temperature 1, no filters)."""
    finish_reason: FinishReason
    """``"eos"``, ``"stop"`` or ``"length"``."""
    prompt_tokens: list[int]
    """The prompt as the model saw it."""
    seed: int
    """The seed in use; with it the same call gives the same result."""


class Generator:
    """Writes text with a language model.

    Prompts are read in pieces through the parallel form of the model, after which every token costs constant
    time and memory. Text prompts begin with the tokenizer's beginning-of-sequence token unless ``bos=False``.

    Args:
        model: a language model such as ``xLSTMLMModel`` or ``xLSTMLarge``, on any device, in any
            dtype and mode.
        tokenizer: its tokenizer; ``None`` for token ids only.
        prefill_chunk: tokens of a prompt that are read at once; bounds the memory of a long prompt.
        max_batch_size: prompts that step together; longer lists are worked off in groups of this size.
        decode: what writes tokens: ``"engine"`` is the native decode engine of CPUs, where a row's result
            does not depend on the batch at all; ``"model"`` the model's own step; ``"auto"`` the engine where
            it can. ``runner.explain()`` says which it is, and why.

    Raises:
        ValueError: ``model`` is not a language model, a size is not positive, or the engine was asked for and
            cannot run this model.

    Example:
        >>> for piece in Generator(model, tokenizer).stream("Once upon a time", max_new_tokens=100):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        *,
        prefill_chunk: int = 512,
        max_batch_size: int = 32,
        decode: Literal["auto", "engine", "model"] = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.runner = ModelRunner(model, prefill_chunk, decode)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size

    def start(
        self,
        prompt: Prompt | None = None,
        sampling: SamplingConfig | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> Session:
        """A session that has read ``prompt`` (nothing for ``None``); see :class:`Session`.

        Args:
            prompt, bos: as for :meth:`stream`.
            sampling, **options: how the session chooses tokens unless told otherwise.
        """
        config = (sampling or SamplingConfig()).updated(**options)
        check_config(config, self.tokenizer)
        session = Session(self.runner, self.tokenizer, config)
        if prompt is not None:
            session.feed(prompt, bos=bos)
        return session

    def resume(self, path: str | Path) -> Session:
        """Take up a session from the file that ``Session.save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is not a session, or belongs to another model.
        """
        return Session.load(path, self.runner, self.tokenizer)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Continue a prompt, piece by piece.

        Args:
            prompt: text or token ids.
            sampling: how to choose tokens and when to end.
            bos: begin with the beginning-of-sequence token; ``None``: for text as the tokenizer says.
            **options: fields of :class:`SamplingConfig` to change.

        Returns:
            an iterator over non-empty pieces of text. A piece never ends inside a character, and no part of a
            stop string is ever given out.

        Raises:
            ValueError: wrong options, an empty prompt without beginning-of-sequence token, token ids that the
                model does not have. Raised by the call itself, before the first piece.
        """
        config = (sampling or SamplingConfig()).updated(**options)
        return self._stream(self._encode(prompt, bos, config), config)

    def _stream(self, ids: list[int], config: SamplingConfig) -> Iterator[str]:
        session = self.start(ids, config)
        yield from session.stream()
        if rest := session.flush():
            yield rest

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Iterable[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> list[str]: ...
    def generate(
        self,
        prompt: Prompt | Iterable[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The texts of :meth:`complete`: a string for one prompt, a list of strings for a list of prompts."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer to write text with; use complete() and its tokens")
        results: Any = self.complete(cast(Any, prompt), cast(Any, sampling), bos=bos, **options)
        return [r.text for r in results] if isinstance(results, list) else results.text

    @overload
    def complete(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> GenerationResult: ...
    @overload
    def complete(
        self,
        prompt: Iterable[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> list[GenerationResult]: ...
    def complete(
        self,
        prompt: Prompt | Iterable[Prompt],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        bos: bool | None = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Continue one prompt or many.

        Args:
            prompt: one text, one list of token ids, or a list of texts and lists of token ids. Any iterable
                will do for a list.
            sampling: how to choose tokens and when to end, for all prompts or for each. A seed counts for
                every row on its own: equal prompts with equal options give equal texts, so for several
                samples of one prompt give each its own seed (the prompt is read only once).
            bos: begin with the beginning-of-sequence token; ``None``: for text as the tokenizer says.
            **options: fields of :class:`SamplingConfig` to change, for all prompts.

        Raises:
            ValueError: as for :meth:`stream`; or the number of configurations is not that of prompts.
        """
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        elif not isinstance(prompt, (str, bytes, bytearray)) and isinstance(prompt, Iterable):
            prompt = cast(Iterable[Prompt], list(prompt))
        single = _is_one_prompt(prompt)
        prompts = cast(Sequence[Prompt], [prompt] if single else prompt)
        if sampling is None or isinstance(sampling, SamplingConfig):
            configs = [(sampling or SamplingConfig()).updated(**options)] * len(prompts)
        else:
            configs = [config.updated(**options) for config in sampling]
        if len(configs) != len(prompts):
            raise ValueError(f"got {len(configs)} sampling configurations for {len(prompts)} prompts")
        encoded = [self._encode(p, bos, c) for p, c in zip(prompts, configs, strict=True)]
        results: list[GenerationResult] = []
        for start in range(0, len(encoded), self.max_batch_size):
            group = slice(start, start + self.max_batch_size)
            results += self._complete(encoded[group], configs[group])
        return results[0] if single else results

    def _encode(self, prompt: Prompt, bos: bool | None, config: SamplingConfig) -> list[int]:
        check_config(config, self.tokenizer)
        ids = encode_prompt(self.tokenizer, prompt, bos)
        if not ids:
            raise ValueError(
                "the prompt is empty and no beginning-of-sequence token is added: nothing to continue"
            )
        self.runner.check_tokens(ids)
        return ids

    def _read(self, prompts: list[list[int]]) -> ModelState:
        """The states after all but the last token of every prompt, each read alone; equal prompts once."""
        known: dict[tuple[int, ...], ModelState] = {}
        states: list[ModelState] = []
        for prompt in prompts:
            key = tuple(prompt)
            if key not in known:
                state = self.runner.initial_state()
                for piece in self.runner.pieces(prompt[:-1]):
                    state = self.runner.read(piece, state)
                known[key] = state
            states.append(known[key])
        return ModelState.stack(states)

    def _complete(self, prompts: list[list[int]], configs: list[SamplingConfig]) -> list[GenerationResult]:
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        rows: list[Continuation] = []
        for prompt, config in zip(prompts, configs, strict=True):
            sampler = Sampler(config, self.runner.vocab_size)
            count_seen(sampler, prompt, self.tokenizer)
            text = TextStream(self.tokenizer, prompt, config.stop)
            rows.append(Continuation(list(prompt), sampler, text, eos_id))
        texts = [""] * len(rows)
        places = list(range(len(rows)))  # row of each place in the stacked state
        state = self.runner.hold(self._read(prompts))
        steps = 0
        while any(row.finish_reason is None for row in rows):
            staying = [n for n, row in enumerate(places) if configs[row].max_new_tokens > steps]
            if len(staying) < len(places):
                places, state = [places[n] for n in staying], state.select(staying)
            logits, state = self.runner.advance([rows[row].tokens[-1] for row in places], state, reuse=True)
            for row, row_logits in zip(places, logits, strict=True):
                if rows[row].finish_reason is None:
                    texts[row] += rows[row].accept(row_logits)
            steps += 1
        return [
            GenerationResult(
                text=text + row.flush(),
                tokens=row.tokens[len(prompt) :],
                logprobs=row.logprobs,
                finish_reason=cast(FinishReason, row.finish_reason),
                prompt_tokens=prompt,
                seed=row.sampler.seed,
            )
            for prompt, row, text in zip(prompts, rows, texts, strict=True)
        ]


def _is_one_prompt(prompt: Any) -> bool:
    """A text, or a sequence of numbers; an empty list is an empty list of prompts."""
    if isinstance(prompt, str):
        return True
    try:
        first = next(iter(prompt), None)
    except TypeError:
        raise ValueError(f"a prompt is a text or a list of token ids, got {prompt!r:.80}") from None
    return first is not None and not isinstance(first, Iterable)
