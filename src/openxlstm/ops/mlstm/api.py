"""The mLSTM operator: signature, documentation, every check, and the choice of backend."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.gpu import support
from openxlstm.ops.mlstm import chunkwise, native, native_chunkwise, reference, triton_backend, triton_decode
from openxlstm.ops.mlstm.advance import mlstm_advance
from openxlstm.ops.mlstm.checks import InputGate, check_options, check_sequence, check_state
from openxlstm.ops.packing import check_boundaries, length_groups, reset_from_cu_seqlens
from openxlstm.state import mLSTMSlots, mLSTMState

StateT = TypeVar("StateT", mLSTMState, mLSTMSlots)

dispatch.register(
    "mlstm",
    "chunkwise",
    chunkwise.chunkwise,
    priority=10,
    description="portable PyTorch, linear in time, exact hand-written backward",
)
dispatch.register(
    "mlstm",
    "triton",
    triton_backend.run,
    priority=30,
    refuse=support.refuse,
    automatic=support.automatic,
    description="GPU kernels, states between chunks then all chunks in parallel, exact gradients",
)
dispatch.register(
    "mlstm",
    "native",
    native_chunkwise.native,
    priority=20,
    refuse=native_chunkwise.refuse,
    description="C++, chunkwise in the cache, exact hand-written backward",
)
dispatch.register(
    "mlstm", "recurrent", reference.recurrent, priority=0, description="the definition, step by step"
)
dispatch.register(
    "mlstm", "parallel", reference.parallel, priority=0, description="the definition, quadratic"
)
dispatch.register(
    "mlstm_step", "recurrent", reference.step, priority=10, description="the definition, one token"
)
dispatch.register(
    "mlstm_step",
    "native",
    native.step,
    priority=20,
    refuse=native.refuse,
    description="C++, one sweep over the memory",
)
dispatch.register(
    "mlstm_step",
    "triton",
    triton_decode.step,
    priority=30,
    refuse=triton_decode.refuse,
    automatic=support.automatic,
    description="GPU kernels, each state read and written once",
)


def mlstm_initial_state(
    batch: int,
    heads: int,
    qk_head_dim: int,
    v_head_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> mLSTMState:
    """The empty state: zeros, m included. ``dtype`` is float32, or float64 to check numerics."""
    return mLSTMState(
        c=torch.zeros(batch, heads, qk_head_dim, v_head_dim, device=device, dtype=dtype),
        n=torch.zeros(batch, heads, qk_head_dim, device=device, dtype=dtype),
        m=torch.zeros(batch, heads, device=device, dtype=dtype),
    )


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: mLSTMState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    assume_scale_invariant_output: bool = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: mLSTMState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    assume_scale_invariant_output: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, mLSTMState]: ...


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: mLSTMState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    assume_scale_invariant_output: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, mLSTMState]:
    """The mLSTM over whole sequences: a matrix memory with exponential gating (arXiv 2405.04517).

    Gradients of every input are exact: through the normaliser, the stabiliser, the initial state and the
    returned state.

    Args:
        q, k: queries and keys (B, T, H, DK), any strides, any floating dtype. Queries are scaled by DK^-1/2
            inside.
        v: values (B, T, H, DV).
        i, f: input and forget gate pre-activations (B, T, H). ``f = -inf`` forgets everything, exactly;
            ``i = -inf`` adds nothing. The forget gate is a sigmoid.
        state: memory to start from, (B, ...); None is the empty state. It is not changed.
        return_state: also return the state after the last token.
        cu_seqlens: int32 offsets (N + 1,) of N documents (empty ones allowed) laid end to end in a batch of
            1; states then have leading dimension N.
        reset: bool (B, T), True where a position starts a new document from the empty state. A row's
            ``state`` acts up to its first reset. Give this or ``cu_seqlens``.
        input_gate: ``"exp"``, or ``"sigmoid"`` (arXiv 2503.14376), whose state has m = 0 throughout.
        normalize: divide by the normaliser; False only with the sigmoid input gate.
        eps: added to the denominator.
        chunk_size: tokens per chunk of the chunkwise backends, any positive number; None chooses.
        assume_scale_invariant_output: allow the backend ``triton`` to leave out the gradient of the
            normaliser. It is zero if h goes only into a function that does not depend on the length of each
            h_t, such as a norm of each head whose eps is small beside h_t; anything else gets wrong
            gradients. h and the states are the same, and so are gradients through returned states.
        backend: ``"auto"`` or a name; see :func:`openxlstm.ops.explain`.

    Returns:
        h (B, T, H, DV) in the dtype of v; with ``return_state`` also the state, float32 (float64 for float64
        inputs).

    Raises:
        ValueError: shapes that do not fit together, an unknown backend or gate, or an impossible combination.
    """
    check_sequence(q, k, v, i, f, chunk_size)
    check_options(input_gate, normalize)
    batch, time, heads, qk_dim = q.shape
    check_boundaries(cu_seqlens, reset, q)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is not None:
        check_state(state, sequences, heads, qk_dim, v.shape[-1], state_dtype, q.device)
    request = dispatch.Request(q.device, q.dtype, {"head_dim": max(qk_dim, v.shape[-1])})
    chosen = dispatch.resolve("mlstm", backend, request)
    run = chosen.implementation
    options: dict[str, Any] = {
        "sigmoid": input_gate == "sigmoid",
        "normalize": normalize,
        "eps": eps,
        "chunk_size": chunk_size,
    }
    if chosen.name == "triton":
        options["scale_invariant"] = assume_scale_invariant_output
    if cu_seqlens is not None and (state is not None or return_state):
        if state is None:
            state = mlstm_initial_state(sequences, heads, qk_dim, v.shape[-1], q.device, state_dtype)
        h, last = _run_documents(run, (q, k, v, i, f), state, cu_seqlens, options)
        return (h, last) if return_state else h
    if cu_seqlens is not None:
        reset = reset_from_cu_seqlens(cu_seqlens, time)
    sizes = (batch, heads, qk_dim, v.shape[-1])
    if state is None and return_state:
        state = mlstm_initial_state(*sizes, q.device, state_dtype)
    elif state is None:  # one zero in every place: nothing to fill, and nothing to keep for the backward
        zeros = mlstm_initial_state(1, 1, 1, 1, q.device, state_dtype)
        state = mLSTMState(*(x.expand(sizes[: x.ndim]) for x in zeros))
    h, *last = run(q, k, v, i, f, *state, reset, **options)
    return (h, mLSTMState(*last)) if return_state else h


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: StateT,
    *,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, StateT]:
    """One token of the mLSTM, in constant time and memory.

    Args:
        q, k: (B, H, DK). v: (B, H, DV). i, f: (B, H).
        state: memory before this token; it is not changed. An :class:`mLSTMSlots` advances in place, see
            :func:`mlstm_advance`, and is returned as it is.
        input_gate, normalize, eps, backend: as for :func:`mlstm`.

    Returns:
        h (B, H, DV) in the dtype of v, and the state after this token.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend or gate.
    """
    if q.ndim != 3:
        raise ValueError(f"q must have shape (B, H, DK) for one token, got {tuple(q.shape)}")
    one_q, one_k, one_v, one_i, one_f = (x.unsqueeze(1) for x in (q, k, v, i, f))
    check_sequence(one_q, one_k, one_v, one_i, one_f, None)
    check_options(input_gate, normalize)
    if isinstance(state, mLSTMSlots):
        known = backend if any(b.name == backend for b in dispatch.backends("mlstm_advance")) else "auto"
        h = mlstm_advance(
            one_q, one_k, one_v, one_i, one_f, state.memory, slots=state.slots, input_gate=input_gate,
            normalize=normalize, eps=eps, backend=known,
        )  # fmt: skip
        return h.squeeze(1), state
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    check_state(state, q.shape[0], q.shape[1], q.shape[2], v.shape[-1], dtype, q.device)
    needs_grad = dispatch.needs_grad(q, k, v, i, f, *state)
    head_dim = max(q.shape[-1], v.shape[-1])
    request = dispatch.Request(q.device, q.dtype, {"needs_grad": needs_grad, "head_dim": head_dim})
    run = dispatch.resolve("mlstm_step", backend, request).implementation
    h, *new = run(q, k, v, i, f, *state, sigmoid=input_gate == "sigmoid", normalize=normalize, eps=eps)
    return h, mLSTMState(*new)  # pyright: ignore[reportReturnType]


def _run_documents(
    run, inputs: tuple[Tensor, ...], state: mLSTMState, cu_seqlens: Tensor, options: dict
) -> tuple[Tensor, mLSTMState]:
    """Documents with states of their own: run them as padded rows, grouped by length.

    Padding takes identity steps (forget nothing, add nothing), so the last state of a row is the state after
    its document, exactly.
    """
    q, k, v, i, f = (x[0] for x in inputs)
    h = torch.zeros_like(v)
    order, pieces = [], []
    for documents, positions, valid in length_groups(cu_seqlens):
        rows = [x[positions] for x in (q, k, v)]
        pad = ~valid[..., None]
        rows += [i[positions].masked_fill(pad, -torch.inf), f[positions].masked_fill(pad, torch.inf)]
        out, *last = run(*rows, *(s[documents] for s in state), None, **options)
        h = h.index_put((positions[valid],), out[valid])
        order.append(documents)
        pieces.append(last)
    if not order:
        return h[None], state
    back = torch.argsort(torch.cat(order))
    return h[None], mLSTMState(*(torch.cat(parts)[back] for parts in zip(*pieces, strict=True)))
