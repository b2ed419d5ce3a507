"""The cells as equations: one time step of each, in plain differentiable PyTorch.

Every head only sees its own previous output. With ``x_g`` the input part of gate ``g``, ``R_g`` its recurrent
matrix of one head and ``b_g`` its bias:

``slstm``, gates i, f, z, o, state (h, c, n, m), all (B, H, D)::

    p_g = x_g + R_g h + b_g
    l   = m + log sigmoid(p_f)
    m'  = p_i                                  where n == 0 (nothing remembered yet), else max(p_i, l)
    i'  = min(1, exp(p_i - m'))                f' = min(1, exp(l - m'))
    c'  = f' c + i' tanh(p_z)                  n' = f' n + i'        (with a normalizer floor: at least that)
    h'  = sigmoid(p_o) c' / n'

``lstm``, gates i, f, z, o, state (h, c)::

    c'  = sigmoid(p_f) c + sigmoid(p_i) tanh(p_z)        h' = sigmoid(p_o) tanh(c')

``gru``, input gates r, z, n, recurrent gates g, r, z, biases g, r, z, n, state (h)::

    g = R_g h + b_g    r = sigmoid(p_r)    z = sigmoid(p_z)    h' = z h + (1 - z) tanh(x_n + b_n + r g)

``elman``, one gate, state (h)::

    h' = tanh(p)

Gradients are those of these equations, with nothing held constant, ``m`` included. Where a minimum or a
floor is met with equality the gradient passes through; ``max`` shares it between equal arguments. With that
choice the gradient of ``h`` is the true one at ties too, because ``h`` does not depend on ``m``.

An input gate of ``+inf``, or of ``-inf`` while nothing is remembered, has no defined result (0 / 0); every
other infinite gate has.

Sources: xLSTM (Beck et al. 2024), FlashRNN (Pöppel et al. 2025) for the gate orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from openxlstm.state import ElmanState, GRUState, LSTMState, sLSTMState


class Cell(NamedTuple):
    """What the operator needs to know about one kind of cell."""

    name: str
    input_gates: str
    """One letter per gate of ``x``, in order."""
    recurrent_gates: str
    """One letter per gate of ``weight``, in order."""
    bias_gates: str
    """One letter per gate of ``bias``, in order."""
    state_type: Any
    """The NamedTuple of its state; the first field is ``h``."""
    step: Callable[..., Any]
    """``(x, recurrent, bias, state, normalizer_floor) -> state``; x (B, G, H, D), recurrent = R h
    (B, G_r, H, D), bias (G_b, H, D) or None. The new ``h`` is the output."""


def _add(x: Tensor, recurrent: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    pre = x + recurrent
    return (pre if bias is None else pre + bias).unbind(1)


def slstm_step(
    x: Tensor, recurrent: Tensor, bias: Tensor | None, state: sLSTMState, normalizer_floor: float | None
) -> sLSTMState:
    """One step of the sLSTM."""
    i, f, z, o = _add(x, recurrent, bias)
    _, c, n, m = state
    log_f = m + functional.logsigmoid(f)
    m = torch.where(n == 0, i, torch.maximum(i, log_f))
    i = torch.exp((i - m).clamp(max=0))
    f = torch.exp((log_f - m).clamp(max=0))
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    if normalizer_floor is not None:
        n = n.clamp(min=normalizer_floor)
    return sLSTMState(torch.sigmoid(o) * (c / n), c, n, m)


def lstm_step(
    x: Tensor, recurrent: Tensor, bias: Tensor | None, state: LSTMState, normalizer_floor: None
) -> LSTMState:
    """One step of the LSTM."""
    i, f, z, o = _add(x, recurrent, bias)
    c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(z)
    return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)


def gru_step(
    x: Tensor, recurrent: Tensor, bias: Tensor | None, state: GRUState, normalizer_floor: None
) -> GRUState:
    """One step of the GRU."""
    x_r, x_z, x_n = x.unbind(1)
    g, r, z = (recurrent if bias is None else recurrent + bias[:3]).unbind(1)
    if bias is not None:
        x_n = x_n + bias[3]
    r, z = torch.sigmoid(x_r + r), torch.sigmoid(x_z + z)
    return GRUState(z * state.h + (1 - z) * torch.tanh(x_n + r * g))


def elman_step(
    x: Tensor, recurrent: Tensor, bias: Tensor | None, state: ElmanState, normalizer_floor: None
) -> ElmanState:
    """One step of the Elman network."""
    (pre,) = _add(x, recurrent, bias)
    return ElmanState(torch.tanh(pre))


CELLS: dict[str, Cell] = {
    "slstm": Cell("slstm", "ifzo", "ifzo", "ifzo", sLSTMState, slstm_step),
    "lstm": Cell("lstm", "ifzo", "ifzo", "ifzo", LSTMState, lstm_step),
    "gru": Cell("gru", "rzn", "grz", "grzn", GRUState, gru_step),
    "elman": Cell("elman", "p", "p", "p", ElmanState, elman_step),
}
"""Every cell by name."""
