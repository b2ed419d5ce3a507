"""Depthwise causal convolution with a carried state and exact document boundaries.

    p_t = bias + sum_{d=0..K-1} weight[:, K-1-d] * x_{t-d};   y_t = p_t, or SiLU(p_t)

where x before the sequence is the state (zeros at the start), and a tap that would reach over a document
boundary reads zero. The state is the last K - 1 inputs, oldest first, with everything before the last
boundary zeroed, so that handing it on can't leak either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.convolution import native, portable, triton_backend
from openxlstm.ops.gpu import support
from openxlstm.ops.packing import check_boundaries

dispatch.register(
    "causal_convolution",
    "portable",
    portable.convolve,
    priority=10,
    description="PyTorch, one tap at a time",
)
dispatch.register(
    "causal_convolution",
    "native",
    native.convolve,
    priority=20,
    refuse=native.refuse,
    automatic=lambda request: request.options.get("time") != 1,  # the call alone costs what one position does
    description="C++, one pass, exact hand-written backward",
)
dispatch.register(
    "causal_convolution",
    "triton",
    triton_backend.convolve,
    priority=30,
    refuse=triton_backend.refuse,
    automatic=support.automatic,
    description="one GPU kernel, for decoding and prefill",
)


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    reset: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps over the past.

    Args:
        x: (B, T, E), any T from 0.
        weight: (E, K), the last tap for the current position; K from 1.
        bias: (E), or None.
        state: the inputs before the first, (B, K - 1, E), oldest first; None is zeros.
        return_state: also return the state after the last position.
        reset: bool (B, T), True where a position starts a new document. The state acts up to the first.
        silu: apply SiLU.
        backend: ``"auto"`` or a name; see :func:`openxlstm.ops.explain`. ``"portable"`` can be differentiated
            more than once.

    Returns:
        y (B, T, E) in the dtype of x; with ``return_state`` also the new state (B, K - 1, E), float32
        (float64 for float64 x).

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown backend.
    """
    _check(x, weight, bias, state)
    check_boundaries(None, reset, x)
    batch, _, channels = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros(batch, past, channels) if state is None else state.to(x.dtype)
    options = {
        "time": x.shape[1],
        "taps": weight.shape[1],
        "needs_grad": dispatch.needs_grad(x, weight, bias, state),
    }
    request = dispatch.Request(x.device, x.dtype, options)
    run = dispatch.resolve("causal_convolution", backend, request).implementation
    y = run(x, weight, bias, before, reset, silu)
    return (y, _last_inputs(x, before, reset)) if return_state else y


def _last_inputs(x: Tensor, before: Tensor, reset: Tensor | None) -> Tensor:
    """The state after ``x``: the last K - 1 inputs of the last document, zeros for those before it."""
    past, time = before.shape[1], x.shape[1]
    last = before
    if time == 1 and past > 0 and reset is None:  # decoding: one copy
        last = torch.cat([before[:, 1:], x], 1)
    elif time > 0 and past > 0:
        position = torch.arange(time - past, time, device=x.device)  # (K - 1), negative: in `before`
        inside = position.clamp_min(0)
        earlier = (position + past).clamp_max(past - 1)
        last = torch.where((position < 0)[:, None], before[:, earlier], x[:, inside])
        if reset is not None:
            document = reset.long().cumsum(1)  # (B, T)
            same = torch.where(position < 0, 0, document[:, inside]) == document[:, -1:]
            last = torch.where(same[..., None], last, 0)
    return last.clone() if x.dtype == torch.float64 else last.to(torch.float32, copy=True)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape (B, T, E), got {x.dtype} {tuple(x.shape)}")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"weight must have shape (E, K) = ({channels}, 1 or more), got {tuple(weight.shape)}"
        )
    shapes = {"bias": (bias, (channels,)), "state": (state, (batch, weight.shape[1] - 1, channels))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("state", state)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
