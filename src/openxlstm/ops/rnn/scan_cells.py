"""The cells of the backend ``scan``: one step forward and one step back in as few operations as possible.

A forward step finds the finished pre-activations of its position in ``gates`` (the driver has added the
recurrent part) and turns them, in place, into what the backward pass needs.

A backward step maps the gradient of ``h`` to those of the pre-activations. Given the activations that map is
linear, and its coefficients depend on no gradient. ``prepare`` computes them for a block of positions at
once, small enough to stay in the cache; what is left for each step is a handful of products.

The stabiliser m of the sLSTM needs no gradient of its own as long as no loss reaches m directly: scaling
(c, n) by exp(-a) and adding a to m leaves every h as it is, so dL/dm = c dL/dc + n dL/dn by Euler's theorem,
and with it the gradient through the choice of m cancels exactly. A gradient of the returned state or an
active normaliser floor breaks that symmetry; then m is followed explicitly (``follow_m``).

Layouts, T positions: ``gates`` (H, T, B, G_b, D) with the slots of ``Cell.bias_gates``; ``hs``
(H, T + 1, B, D) and ``memory`` (T + 1, S, H, B, D), h and the state without h and m, before each position and
after the last; ``factors`` (T, F, H, B, D), the gates i' and f' of the sLSTM. Numbers kept per position and
channel: sLSTM 9, LSTM 6, GRU 5, Elman 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional


def by_time(x: Tensor) -> Tensor:
    """(H, T, ...) as (T, H, ...), or back."""
    return x.transpose(0, 1)


def slots(gates: Tensor, begin: int, end: int) -> Tensor:
    """Slots of gates (H, T, B, G_b, D) stacked in front: (T, end - begin, H, B, D), a view."""
    return gates[:, :, :, begin:end].permute(1, 3, 0, 2, 4)


class ElmanSteps:
    """Elman network: h' = tanh(p)."""

    memory_slots: ClassVar[int] = 0
    factor_slots: ClassVar[int] = 0

    def __init__(
        self, gates: Tensor, hs: Tensor, memory: Tensor, factors: Tensor, normalizer_floor: float | None
    ) -> None:
        self.gates, self.hs, self.memory, self.factors = gates, by_time(hs), memory, factors
        self.floor = normalizer_floor

    def start(self, state: Tensor) -> None:
        """Begin a forward pass at ``state`` (S, H, B, D)."""
        self.h = self.hs.unbind(0)
        self.p = slots(self.gates, 0, 1).squeeze(1).unbind(0)

    def forward(self, t: int, h_before: Tensor, drop: Tensor | None) -> None:
        """Write h of position t. Rows in ``drop`` (B, 1) start empty; ``h_before`` is zero there already."""
        torch.tanh(self.p[t], out=self.h[t + 1])

    def last(self) -> list[Tensor]:
        """The state after the last position without h, leaves (H, B, D)."""
        return []

    def start_backward(self, d_gates: Tensor, d_last: Tensor | None, h_before: Tensor) -> None:
        """Begin a backward pass: where to write gradients, the gradient of the final state (S, H, B, D) or
        None if it is zero, and the output before each position (T, H, B, D)."""
        self.d_p = slots(d_gates, 0, 1).squeeze(1).unbind(0)

    def prepare(self, begin: int, end: int, reset: Tensor | None) -> None:
        """Coefficients of positions [begin, end); reset (end - begin, B, 1) marks rows that start empty."""
        h = self.hs[begin + 1 : end + 1]
        self.slope = (1 - h * h).unbind(0)

    def backward(self, t: int, k: int, d_h: Tensor, drop: Tensor | None) -> Tensor | None:
        """Write the gradients of the pre-activations of position t, number k of the block, given the whole
        gradient of its h. Returns what reaches the h before it other than through the recurrent weight."""
        torch.mul(d_h, self.slope[k], out=self.d_p[t])
        return None

    def first_gradients(self) -> list[Tensor]:
        """Gradients of the initial state without h, leaves (H, B, D)."""
        return []


class LSTMSteps(ElmanSteps):
    """LSTM: c' = f c + i z, h' = o tanh(c')."""

    memory_slots = 1

    def start(self, state: Tensor) -> None:
        self.h = self.hs.unbind(0)
        self.memory[0, 0] = state[1]
        self.c = self.memory.squeeze(1).unbind(0)
        self.i_f = slots(self.gates, 0, 2).unbind(0)
        self.i, self.f, self.z, self.o = (slot.unbind(0) for slot in slots(self.gates, 0, 4).unbind(1))

    def forward(self, t: int, h_before: Tensor, drop: Tensor | None) -> None:
        c = self.c[t] if drop is None else self.c[t].masked_fill(drop, 0)
        torch.sigmoid_(self.i_f[t])
        torch.tanh_(self.z[t])
        torch.sigmoid_(self.o[t])
        new = torch.mul(c, self.f[t], out=self.c[t + 1])
        new.addcmul_(self.i[t], self.z[t])
        torch.tanh(new, out=self.h[t + 1]).mul_(self.o[t])

    def last(self) -> list[Tensor]:
        return [self.c[-1]]

    def start_backward(self, d_gates: Tensor, d_last: Tensor | None, h_before: Tensor) -> None:
        self.d_ifz = slots(d_gates, 0, 3).unbind(0)
        self.d_o = slots(d_gates, 3, 4).squeeze(1).unbind(0)
        self.d_c = torch.zeros_like(self.memory[0, 0]) if d_last is None else d_last[1].clone()

    def prepare(self, begin: int, end: int, reset: Tensor | None) -> None:
        i, f, z, o = slots(self.gates, 0, 4)[begin:end].unbind(1)
        before, c = self.memory[begin:end, 0], self.memory[begin + 1 : end + 1, 0]
        if reset is not None:
            before = before.masked_fill(reset.unsqueeze(1), 0)
        tanh_c = torch.tanh(c)
        self.to_c = (o * (1 - tanh_c * tanh_c)).unbind(0)
        self.to_o = (o * (1 - o) * tanh_c).unbind(0)
        to_ifz = torch.stack((z * i * (1 - i), before * f * (1 - f), i * (1 - z * z)), 1)
        self.to_ifz = to_ifz.unbind(0)
        self.keep = f.unbind(0)

    def backward(self, t: int, k: int, d_h: Tensor, drop: Tensor | None) -> Tensor | None:
        self.d_c.addcmul_(self.to_c[k], d_h)
        torch.mul(self.to_o[k], d_h, out=self.d_o[t])
        torch.mul(self.to_ifz[k], self.d_c, out=self.d_ifz[t])
        self.d_c.mul_(self.keep[k])
        if drop is not None:
            self.d_c.masked_fill_(drop, 0)
        return None

    def first_gradients(self) -> list[Tensor]:
        return [self.d_c]


class GRUSteps(ElmanSteps):
    """GRU: h' = z h + (1 - z) tanh(n + r g); slots g, r, z, n."""

    def start(self, state: Tensor) -> None:
        self.h = self.hs.unbind(0)
        self.r_z = slots(self.gates, 1, 3).unbind(0)
        self.g, self.r, self.z, self.n = (slot.unbind(0) for slot in slots(self.gates, 0, 4).unbind(1))

    def forward(self, t: int, h_before: Tensor, drop: Tensor | None) -> None:
        torch.sigmoid_(self.r_z[t])
        n = self.n[t].addcmul_(self.r[t], self.g[t]).tanh_()
        torch.lerp(n, h_before, self.z[t], out=self.h[t + 1])

    def start_backward(self, d_gates: Tensor, d_last: Tensor | None, h_before: Tensor) -> None:
        self.d_grzn = slots(d_gates, 0, 4).unbind(0)
        self.before = h_before

    def prepare(self, begin: int, end: int, reset: Tensor | None) -> None:
        g, r, z, n = slots(self.gates, 0, 4)[begin:end].unbind(1)
        to_n = (1 - z) * (1 - n * n)
        to_g = to_n * r
        to_z = (self.before[begin:end] - n) * z * (1 - z)
        self.to_grzn = torch.stack((to_g, to_g * g * (1 - r), to_z, to_n), 1).unbind(0)
        self.keep = z.unbind(0)

    def backward(self, t: int, k: int, d_h: Tensor, drop: Tensor | None) -> Tensor | None:
        torch.mul(self.to_grzn[k], d_h, out=self.d_grzn[t])
        return d_h.mul_(self.keep[k])


class sLSTMSteps(ElmanSteps):
    """sLSTM, see :mod:`openxlstm.ops.rnn.cells`."""

    memory_slots = 2
    factor_slots = 2

    def start(self, state: Tensor) -> None:
        self.h = self.hs.unbind(0)
        self.memory[0] = state[1:3]
        self.m = state[3].clone()
        self.cn = self.memory.unbind(0)
        self.c, self.n = (part.unbind(0) for part in self.memory.unbind(1))
        self.i_f = self.factors.unbind(0)
        self.i, self.f = (part.unbind(0) for part in self.factors.unbind(1))
        self.p_i, self.p_f, self.z, self.o = (s.unbind(0) for s in slots(self.gates, 0, 4).unbind(1))

    def forward(self, t: int, h_before: Tensor, drop: Tensor | None) -> None:
        p_i, i, f, m, before = self.p_i[t], self.i[t], self.f[t], self.m, self.cn[t]
        if drop is not None:
            before = before.masked_fill(drop, 0)
            m.masked_fill_(drop, 0)
        torch.add(m, functional.logsigmoid(self.p_f[t]), out=f)
        torch.maximum(p_i, f, out=m)
        if t == 0 or drop is not None:  # n >= 1 after the first step of a document
            m.copy_(torch.where(before[1] == 0, p_i, m))
        torch.sub(p_i, m, out=i)
        f.sub_(m)
        if t == 0 or drop is not None:
            f.clamp_(max=0)
        self.i_f[t].exp_()
        torch.mul(before, f, out=self.cn[t + 1])
        c = self.c[t + 1].addcmul_(i, self.z[t].tanh_())
        n = self.n[t + 1].add_(i)
        if self.floor is not None:
            n.clamp_(min=self.floor)
        torch.div(c, n, out=self.h[t + 1]).mul_(self.o[t].sigmoid_())

    def last(self) -> list[Tensor]:
        return [self.c[-1], self.n[-1], self.m]

    def start_backward(self, d_gates: Tensor, d_last: Tensor | None, h_before: Tensor) -> None:
        self.d_if = slots(d_gates, 0, 2).unbind(0)
        self.d_z, self.d_o = (slot.unbind(0) for slot in slots(d_gates, 2, 4).unbind(1))
        self.follow_m = d_last is not None or self.floor is not None
        self.d_cn = torch.zeros_like(self.memory[0]) if d_last is None else d_last[1:3].clone()
        self.d_c, self.d_n = self.d_cn.unbind(0)
        self.d_m = torch.zeros_like(self.d_c) if d_last is None else d_last[3].clone()

    def prepare(self, begin: int, end: int, reset: Tensor | None) -> None:
        _, p_f, z, o = slots(self.gates, 0, 4)[begin:end].unbind(1)
        before, n = self.memory[begin:end], self.memory[begin + 1 : end + 1, 1]
        i, f = self.factors[begin:end].unbind(1)
        h = self.hs[begin + 1 : end + 1]
        if reset is not None:
            before = before.masked_fill(reset[:, None, None], 0)
        self.to_cn = torch.stack((o / n, -h / n), 1).unbind(0)
        self.to_o = torch.addcmul(h, h, o, value=-1).unbind(0)
        self.to_z = torch.addcmul(i, i, z * z, value=-1).unbind(0)
        self.keep = f.unbind(0)
        slope = torch.sigmoid(-p_f)  # of log sigmoid
        if self.follow_m:
            self._prepare_m(before, i, f, slope)
        else:
            f = f * slope
        c_part, n_part = (before * f.unsqueeze(1)).unbind(1)
        self.c_to_if = torch.stack((z * i, c_part), 1).unbind(0)
        self.n_to_if = torch.stack((i, n_part), 1).unbind(0)

    def _prepare_m(self, before: Tensor, i: Tensor, f: Tensor, slope: Tensor) -> None:
        """Which of its two arguments the maximum m was: its slope, shared at ties."""
        n = before[:, 1]
        from_f = (f == 1) * (1 - 0.5 * (i == 1)) * (n != 0)
        self.from_if = torch.stack((1 - from_f, from_f), 1).unbind(0)
        self.slope = slope.unbind(0)
        if self.floor is not None:
            self.above = (f * n + i >= self.floor).to(f.dtype).unbind(0)

    def backward(self, t: int, k: int, d_h: Tensor, drop: Tensor | None) -> Tensor | None:
        self.d_cn.addcmul_(self.to_cn[k], d_h)
        if self.floor is not None:
            self.d_n.mul_(self.above[k])
        torch.mul(self.to_o[k], d_h, out=self.d_o[t])
        torch.mul(self.to_z[k], self.d_c, out=self.d_z[t])
        d_if = torch.mul(self.c_to_if[k], self.d_c, out=self.d_if[t])
        d_if.addcmul_(self.n_to_if[k], self.d_n)
        if self.follow_m:
            d_if.addcmul_(self.from_if[k], self.d_m - d_if[0] - d_if[1])
            self.d_m.copy_(d_if[1])
            d_if[1].mul_(self.slope[k])
        self.d_cn.mul_(self.keep[k])
        if drop is not None:
            self.d_cn.masked_fill_(drop, 0)
            self.d_m.masked_fill_(drop, 0)
        return None

    def first_gradients(self) -> list[Tensor]:
        if not self.follow_m:
            self.d_m = (self.memory[0] * self.d_cn).sum(0)
        return [self.d_c, self.d_n, self.d_m]


STEPS: dict[str, type[ElmanSteps]] = {
    "slstm": sLSTMSteps,
    "lstm": LSTMSteps,
    "gru": GRUSteps,
    "elman": ElmanSteps,
}
