"""The lm-evaluation-harness (``lm_eval``) on models of this library. The only module that imports it.

    openxlstm eval harness --model_args pretrained=runs/demo/model --tasks my_task --include_path tasks/

A recurrent model reads a prompt once and keeps the state: the answers of a multiple-choice question all go on
from it, and so do prompts that begin alike, such as questions after the same examples. What is computed stays
the same.

Importing this module registers the model under the name ``openxlstm``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from openxlstm.checkpoint import load_pretrained
from openxlstm.evaluation.text import evaluating
from openxlstm.inference import Generator
from openxlstm.state import ModelState

PIECE = 1024  # tokens of a prompt that are read at once
UNLIMITED = 2**31
SHORTEST_SHARED = 16  # shorter common beginnings are read again


class Request(NamedTuple):
    """A continuation to score after a context, and where its result belongs."""

    number: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]


@register_model("openxlstm")
class OpenXLSTM(TemplateLM):
    """A language model with states, for the harness.

    Args:
        pretrained: checkpoint directory or hub id.
        dtype: floating point type of the weights; None keeps what is stored.
        device: where to run.
        batch_size: continuations that are read at a time.
        max_length: forget what lies further back, as models with a limited context must; None never does.

    Attributes:
        tokens_read: tokens that went through the model so far.
        tokens_asked: tokens that would have without sharing states.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise ValueError("name the model: --model_args pretrained=DIRECTORY (or a hub id)")
        self.model, tokenizer = load_pretrained(str(pretrained), dtype=dtype, device=device or "auto")
        if tokenizer is None:
            raise ValueError(f"'{pretrained}' has no tokenizer, which the harness needs")
        self._device = next(self.model.parameters()).device
        self.tokenizer = tokenizer
        self.name = os.fspath(pretrained)
        self.rows = int(batch_size) if str(batch_size).isdigit() else 16
        self.max_length = UNLIMITED if max_length is None else int(max_length)
        self.tokens_read = self.tokens_asked = 0

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise ValueError(f"the tokenizer of '{self.name}' has no end-of-text token")
        return eos

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that texts without a context begin with."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with a first token if the tokenizer has one and the text does not begin with it."""
        if add_special_tokens is None and self.tokenizer.bos and string.startswith(self.tokenizer.bos):
            add_special_tokens = False
        return self.tokenizer.encode(string, bos=add_special_tokens, parse_special=True)

    # ------------------------------------------------------------------ scoring

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log probability, is it what greedy decoding gives) of each continuation after its context."""
        work: list[Request] = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"an answer has {len(continuation)} tokens, more than max_length={self.max_length}; "
                    "raise it, or leave it out: the state has no limit"
                )
            kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
            split = len(kept) - len(continuation)
            work.append(Request(index, tuple(kept[:split]), tuple(kept[split:])))
            self.tokens_asked += len(kept) - 1
        results: list[tuple[float, bool]] = [(0.0, True)] * len(work)
        with evaluating(self.model):
            for group, state in self._contexts(work):
                for start in range(0, len(group), self.rows):
                    part = group[start : start + self.rows]
                    for request, result in zip(part, self._score(part, state), strict=True):
                        results[request.number] = result
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _contexts(self, work: Sequence[Request]) -> Any:
        """Yield (requests with one context, state after all of it but its last token).

        In lexicographic order, contexts with a common beginning are neighbours; the states at the places
        where the next one will part are kept on a stack.
        """
        ordered = sorted(work, key=lambda request: request.context)
        groups: list[list[Request]] = []
        for request in ordered:
            if groups and groups[-1][0].context == request.context:
                groups[-1].append(request)
            else:
                groups.append([request])
        stack: list[tuple[int, ModelState]] = [(0, self.model.initial_state(1))]
        for number, group in enumerate(groups):
            context = group[0].context[:-1]
            following = groups[number + 1][0].context if number + 1 < len(groups) else ()
            shared = _common(context, following[:-1])
            done, state = stack[-1]
            if shared >= done + SHORTEST_SHARED:
                state, done = self._read(context[done:shared], state), shared
                stack.append((done, state))
            yield group, self._read(context[done:], state)
            while stack[-1][0] > shared:
                stack.pop()

    def _read(self, tokens: Sequence[int], state: ModelState) -> ModelState:
        self.tokens_read += len(tokens)
        for start in range(0, len(tokens), PIECE):
            piece = torch.tensor([tokens[start : start + PIECE]], dtype=torch.long, device=self._device)
            state = self.model.read(piece, state)
        return state

    def _score(self, group: Sequence[Request], state: ModelState) -> list[tuple[float, bool]]:
        """Score continuations that share a context; shorter ones are padded at the end, which changes
        nothing."""
        rows = [[request.context[-1], *request.continuation[:-1]] for request in group]
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        self.tokens_read += sum(map(len, rows))
        results: list[tuple[float, bool]] = []
        sums, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        states = state.fork(len(rows))
        for start in range(0, longest, PIECE):
            tokens = torch.tensor([row[start : start + PIECE] for row in padded], device=self._device)
            logits, states = self.model(tokens, states, return_state=True)
            chances = logits.float().log_softmax(-1).cpu()
            for index, request in enumerate(group):
                wanted = torch.tensor(request.continuation[start : start + PIECE], dtype=torch.long)
                if len(wanted):
                    found = chances[index, : len(wanted)]
                    sums[index] += found.gather(-1, wanted[:, None]).double().sum()
                    greedy[index] &= bool((found.argmax(-1) == wanted).all())
        results += zip(sums.tolist(), greedy.tolist(), strict=True)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, streamed, or in windows of ``max_length``."""
        totals: list[float] = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # ------------------------------------------------------------------ generating

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings, the end of text, or the limit of tokens."""
        generator = Generator(self.model, self.tokenizer)
        texts: list[str] = []
        for context, settings in (request.args for request in requests):
            stop = settings.get("until") or ()
            limits = [
                settings[name]
                for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
                if name in settings
            ]
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            prompt = self.tok_encode(context)[-self.max_length :]
            (text,) = generator.generate(
                [prompt],
                max_new_tokens=int(limits[0]) if limits else 256,
                temperature=temperature,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                seed=0,
            )
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
        return texts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command line, with this model registered and as the default ``--model``.

    Raises:
        SystemExit: as the harness decides.
    """
    import sys

    from lm_eval.__main__ import cli_evaluate

    words = list(arguments)
    if "--model" not in words and "--tasks" in words:
        words = [*words, "--model", "openxlstm"]
    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
