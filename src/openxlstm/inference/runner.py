"""Running a language model for generation: prompts in pieces, then one token at a time.

A recurrent model reads a prompt of any length with the memory of one piece: each piece goes through the
parallel (chunkwise) form and hands its state to the next. After that every token costs the same time and
memory, however long the text has become. All but the last token of a prompt are read this way; the last one
is the first decode step. On CPUs the native decode engine takes those steps, on GPUs a CUDA graph.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.config import nearest_name
from openxlstm.inference import engine, graph_engine
from openxlstm.inference.slots import HeldState, SlotEngine, evaluating, fingerprint
from openxlstm.ops.native import loader
from openxlstm.state import ModelState

DECODERS = ("auto", "engine", "model")

State = ModelState | HeldState
"""A state while tokens are written: a value, or held in slots of the decode engine."""


class ModelRunner:
    """A language model in evaluation mode without gradients, whatever mode the caller left it in.

    Args:
        model: a language model (``vocab_size``, ``read``, ``step``, ``initial_state``). Its training flags
            are restored after every call.
        prefill_chunk: tokens of a prompt that are read at once; bounds the memory of a long prompt.
        decode: what writes tokens: ``"engine"``, the native decode engine of CPUs or the CUDA graphs of
            GPUs; ``"model"``, the model's own step; ``"auto"``, the engine where it can.

    Raises:
        ValueError: ``model`` is not a language model, ``prefill_chunk`` is not positive, or ``decode`` is
            unknown or asks for an engine that cannot run this model.
    """

    def __init__(self, model: nn.Module, prefill_chunk: int = 512, decode: str = "auto") -> None:
        missing = [n for n in ("vocab_size", "read", "step", "initial_state") if not hasattr(model, n)]
        if not isinstance(model, nn.Module) or missing:
            raise ValueError(
                f"a {type(model).__name__} cannot generate text: pass a language model such as xLSTMLMModel "
                f"or xLSTMLarge{' (missing: ' + ', '.join(missing) + ')' if missing else ''}"
            )
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1 token, got {prefill_chunk}")
        if decode not in DECODERS:
            hint = nearest_name(decode, DECODERS)
            raise ValueError(f"decode must be one of {', '.join(DECODERS)}, got {decode!r}.{hint}")
        self.model: Any = model
        self.prefill_chunk = prefill_chunk
        self.decode = decode
        self._engine: SlotEngine | None = None
        if decode == "engine" and (reason := self._why_not()) is not None:
            raise ValueError(f"the decode engine cannot run this model: {reason}")

    @property
    def vocab_size(self) -> int:
        """Number of logits, V."""
        return self.model.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        return evaluating(self.model)

    def initial_state(self) -> ModelState:
        """The state before any token, batch of 1."""
        with self._evaluating():
            return self.model.initial_state(1, device=self.device)

    def pieces(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """``tokens`` cut into pieces of at most ``prefill_chunk``."""
        for start in range(0, len(tokens), self.prefill_chunk):
            yield list(tokens[start : start + self.prefill_chunk])

    def read(self, tokens: Sequence[int], state: ModelState) -> ModelState:
        """The state after one piece of text (batch of 1). The state passed in stays as it is."""
        with self._evaluating():
            batch = torch.tensor([list(tokens)], dtype=torch.long, device=self.device)
            return self.model.read(batch, state)

    def _why_not(self) -> str | None:
        kind = graph_engine if self.device.type == "cuda" else engine
        return kind.why_not(self.model)

    def engine_refused(self) -> str | None:
        """Why tokens are written by the model's own step; None if the decode engine writes them."""
        return "decode='model' was asked for" if self.decode == "model" else self._why_not()

    def explain(self) -> str:
        """One line: what writes tokens, and why."""
        reason = self.engine_refused()
        if reason is not None:
            return f"decoding with the model's own steps in PyTorch: {reason}"
        if self.device.type == "cuda":
            return "decoding with CUDA graphs, one per batch size"
        status = loader.status()
        return f"decoding with the native engine: {status.isa}, {status.threads} threads"

    def hold(self, state: State) -> State:
        """The same state where the next tokens are written: in slots of the decode engine, if it can."""
        if self.engine_refused() is not None:
            return self.release(state)
        if self._engine is None or self._engine.fingerprint != fingerprint(self.model):
            kind = graph_engine.GraphEngine if self.device.type == "cuda" else engine.DecodeEngine
            self._engine = kind(self.model)
        if isinstance(state, HeldState) and state.engine is self._engine:
            return state
        return self._engine.open(self.release(state))

    @staticmethod
    def release(state: State) -> ModelState:
        """The same state as a value."""
        return state.state() if isinstance(state, HeldState) else state

    def advance(self, tokens: Sequence[int], state: State, *, reuse: bool = False) -> tuple[Tensor, State]:
        """One token for every row: logits (B, V) of the next tokens, and the new state.

        Args:
            tokens: one per row.
            state: what :meth:`hold` returned, or this method.
            reuse: the old state is not needed any more.
        """
        if isinstance(state, HeldState):
            return state.engine.step(tokens, state, reuse=reuse)
        return self.step(tokens, state)

    def step(self, tokens: Sequence[int], state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row through the model: logits (B, V) of the next tokens, and the new state."""
        with self._evaluating():
            batch = torch.tensor(tokens, dtype=torch.long, device=self.device)[:, None]
            logits, state = self.model.step(batch, state)
        return logits[:, -1], state

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            ValueError: naming the first such id.
        """
        for position, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} at position {position} is out of range: the model has "
                    f"{self.vocab_size} tokens (0 to {self.vocab_size - 1}). Does the tokenizer belong to it?"
                )

    def architecture(self) -> str:
        """A digest of the model's type and of the names and shapes of its parameters."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
        return digest.hexdigest()[:16]

    def weights(self) -> str:
        """A digest of a few values of every parameter, rounded to bfloat16: the same in every dtype."""
        digest = hashlib.sha256()
        for _, parameter in self.model.named_parameters():
            flat = parameter.detach().reshape(-1)
            ends = torch.cat([flat[:8], flat[-8:]]).to("cpu", torch.bfloat16)
            digest.update(ends.float().numpy().tobytes())
        return digest.hexdigest()[:16]
