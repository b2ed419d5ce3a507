"""The decode engine of GPUs: a model's whole step is one CUDA graph, and states advance in their slots.

At batch 1 a step is bound by reading the weights once; launching some fifteen kernels per block from Python
would cost as much again. A graph is recorded once per batch size (powers of two: missing rows are marked with
slot -1 and skipped) and replayed for every token. Matrix memories are read and written once, in place, by
:func:`openxlstm.ops.mlstm_advance`; the small states (convolutions, scalar cells) are gathered and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openxlstm.inference.slots import SlotEngine, evaluating
from openxlstm.ops import dispatch
from openxlstm.state import KVCache, ModelState, leaves, map_state, mLSTMSlots, mLSTMState

_SPARE = 0  # the slot whose small states the missing rows of a batch read and write


class GraphEngine(SlotEngine):
    """Runs one model's decode steps on a GPU.

    Args:
        model: a language model on a CUDA or ROCm device; evaluation mode is implied.

    Raises:
        ValueError: the engine cannot run this model, see :func:`why_not`.
    """

    def __init__(self, model: nn.Module) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"the decode engine cannot run this model: {reason}")
        self._model: Any = model
        self.vocab_size = self._model.vocab_size
        self._steps: dict[int, _Step] = {}
        super().__init__(model)
        self._grow(1)
        self._free.remove(_SPARE)

    def _new_states(self, slots: int) -> ModelState:
        with torch.inference_mode(False), torch.no_grad():
            return map_state(Tensor.contiguous, self._model.initial_state(slots))

    def _moved(self) -> None:
        self._steps = {}  # graphs know addresses

    def _step(self, tokens: Sequence[int], before: list[int], after: list[int]) -> Tensor:
        missing = [0] * ((1 << (len(tokens) - 1).bit_length()) - len(tokens))
        with torch.no_grad():
            if before != after:
                old, new = (torch.tensor(slots, device=self._device) for slots in (before, after))
                for leaf in leaves(self.states):
                    leaf[new] = leaf[old]
            step = self._steps.get(len(tokens) + len(missing)) or self._recorded(len(tokens) + len(missing))
            rows = [_SPARE for _ in missing]
            step.tokens.copy_(torch.tensor([*tokens, *missing])[:, None], non_blocking=True)
            step.rows.copy_(torch.tensor([*after, *rows]), non_blocking=True)
            step.slots.copy_(torch.tensor([*after, *(-1 for _ in missing)]), non_blocking=True)
            step.run()
        return step.logits[: len(tokens)].clone()

    @property
    def _device(self) -> torch.device:
        return leaves(self.states)[0].device

    def _recorded(self, batch: int) -> _Step:
        """Record the step of a batch size. Every row is missing meanwhile, so that no state advances."""
        device = self._device
        tokens = torch.zeros((batch, 1), dtype=torch.long, device=device)
        rows = torch.full((batch,), _SPARE, dtype=torch.long, device=device)
        slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
        logits = torch.empty((batch, self.vocab_size), device=device)
        states = self.states

        def run() -> None:
            with evaluating(self._model):
                result, after = self._model.step(tokens, _rows(states, slots, rows))
                _put(states, after, rows)
                logits.copy_(result[:, -1])

        self._steps[batch] = _Step(tokens, rows, slots, logits, record(run))
        return self._steps[batch]


class _Step(NamedTuple):
    """A recorded step, and the memory it reads and writes."""

    tokens: Tensor
    """int64 (B, 1)."""
    rows: Tensor
    """int64 (B,): slots of small states."""
    slots: Tensor
    """int32 (B,): slots of matrix memories, -1 for missing rows."""
    logits: Tensor
    """float32 (B, V)."""
    run: Callable[[], None]


def record(function: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what ``function`` launches, after runs that compile kernels and choose algorithms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _rows(states: Any, slots: Tensor, rows: Tensor) -> Any:
    """The states of a batch: matrix memories by their slots, small states gathered."""
    if isinstance(states, Tensor):
        return states[rows]
    if isinstance(states, mLSTMState):
        return mLSTMSlots(states, slots)
    parts = [_rows(part, slots, rows) for part in states]
    return type(states)(*parts) if hasattr(states, "_fields") else tuple(parts)


def _put(states: Any, new: Any, rows: Tensor) -> None:
    """Put the small states of a batch back."""
    if isinstance(states, Tensor):
        states.index_copy_(0, rows, new.to(states.dtype))
    elif not isinstance(new, mLSTMSlots):
        for mine, theirs in zip(states, new, strict=True):
            _put(mine, theirs, rows)


def _grows(state: Any) -> bool:
    """Whether a state gets larger with the text."""
    return isinstance(state, KVCache) or (isinstance(state, tuple) and any(map(_grows, state)))


def why_not(model: nn.Module) -> str | None:
    """Why the engine cannot run ``model``, or None if it can."""
    weight = next(model.parameters(), None)
    if weight is None or weight.device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on {getattr(weight, 'device', 'no device')}"
    if _grows(model.initial_state(1, device="meta")):  # pyright: ignore[reportCallIssue]
        return "its state grows with the text, and a CUDA graph has one size"
    for module in model.modules():
        backend = getattr(module, "step_backend", "auto")
        if backend not in ("auto", "triton"):
            return f"the configuration asks for the backend '{backend}'"
    for operator in ("mlstm_advance", "rnn_step"):
        request = dispatch.Request(weight.device, weight.dtype)
        for backend in dispatch.backends(operator):
            if backend.name == "triton" and (reason := backend.refuse(request)) is not None:
                return reason
    return None
