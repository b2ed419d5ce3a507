"""The mLSTM in place: a few tokens for a batch of unrelated sequences whose states live in slots."""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.gpu import support
from openxlstm.ops.mlstm import chunkwise, triton_decode
from openxlstm.ops.mlstm.checks import InputGate, check_options, check_sequence, check_state
from openxlstm.state import mLSTMState


def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    slots: Tensor | None,
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
) -> Tensor:
    """Gather the states, run the chunkwise backend, scatter them back."""
    state, inputs, h = (c, n, m), (q, k, v, i, f), torch.zeros_like(v)
    rows = torch.arange(q.shape[0], device=q.device)
    where = rows if slots is None else slots.long()
    rows, where = rows[where >= 0], where[where >= 0]
    options = {"sigmoid": sigmoid, "normalize": normalize, "eps": eps}
    tensors = [*(x[rows] for x in inputs), *(s[where] for s in state), None]
    out, *last = chunkwise.chunkwise(*tensors, **options)  # type: ignore[call-arg]
    h[rows] = out
    for s, new in zip(state, last, strict=True):
        s[where] = new
    return h


dispatch.register(
    "mlstm_advance",
    "chunkwise",
    _portable,
    priority=10,
    description="portable PyTorch: gather, chunkwise, scatter",
)
dispatch.register(
    "mlstm_advance",
    "triton",
    triton_decode.advance,
    priority=30,
    refuse=support.refuse,
    automatic=support.automatic,
    description="GPU kernels, each state read and written once",
)


@torch.no_grad()
def mlstm_advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: mLSTMState,
    *,
    slots: Tensor | None = None,
    input_gate: InputGate = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Advance states in place by a few tokens: decoding, speculative decoding, the tail of a prompt.

    Made for few tokens (each state is read and written once, tokens pass one after the other); long
    sequences are faster through :func:`openxlstm.ops.mlstm`. Records no gradient.

    Args:
        q, k: (B, T, H, DK). v: (B, T, H, DV). i, f: (B, T, H). As for :func:`openxlstm.ops.mlstm`.
        state: contiguous memory of S slots, c (S, H, DK, DV), n (S, H, DK), m (S, H); changed in place.
        slots: integers (B,), the slot of each row; no slot twice. A negative one marks a row to skip (its h
            is zero), so that a batch of fixed size can be captured in a CUDA graph. None: row b has slot b.
        input_gate, normalize, eps, backend: as for :func:`openxlstm.ops.mlstm`.

    Returns:
        h (B, T, H, DV) in the dtype of v.

    Raises:
        ValueError: shapes that do not fit, a state that is not contiguous, an unknown backend or gate.
    """
    check_sequence(q, k, v, i, f, None)
    check_options(input_gate, normalize)
    batch, _, heads, dk = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    count = batch if slots is None else (state[0].shape[0] if len(state) else 0)
    check_state(state, count, heads, dk, v.shape[-1], dtype, q.device)
    for name, x in zip(state._fields, state, strict=True):
        if not x.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous to be changed in place, got {x.stride()}")
    if slots is not None and (
        tuple(slots.shape) != (batch,)
        or slots.dtype not in (torch.int32, torch.int64)
        or slots.device != q.device
    ):
        raise ValueError(
            f"slots must be integers of shape (B,) = {(batch,)} on {q.device}, "
            f"got {slots.dtype} {tuple(slots.shape)} on {slots.device}"
        )
    request = dispatch.Request(q.device, q.dtype, {"head_dim": max(dk, v.shape[-1])})
    run = dispatch.resolve("mlstm_advance", backend, request).implementation
    options = {"sigmoid": input_gate == "sigmoid", "normalize": normalize, "eps": eps}
    return run(q, k, v, i, f, *state, slots, **options)
