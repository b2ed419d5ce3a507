"""The shared table of mLSTM cases: every backend is compared with the float64 definition on each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openxlstm.ops import mlstm
from openxlstm.state import mLSTMState


@dataclass(frozen=True)
class Case:
    """One problem: shapes, gates, and what the sequence contains."""

    batch: int = 2
    time: int = 37
    heads: int = 2
    qk_dim: int = 8
    v_dim: int = 12
    input_gate: str = "exp"
    normalize: bool = True
    gate_std: float = 1.0
    forget_mean: float = 2.0
    with_state: bool = False
    reset_every: int = 0
    forget_all_at: tuple[int, ...] = ()
    eps: float = 1e-6
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * std + mean).to(dtype)

        b, t, h, dk, dv = self.batch, self.time, self.heads, self.qk_dim, self.v_dim
        x = {
            "q": normal(b, t, h, dk),
            "k": normal(b, t, h, dk),
            "v": normal(b, t, h, dv),
            "i": normal(b, t, h, std=self.gate_std),
            "f": normal(b, t, h, std=self.gate_std, mean=self.forget_mean),
        }
        for position in self.forget_all_at:
            x["f"][:, position] = -torch.inf
        if self.with_state:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            x["c0"] = normal(b, h, dk, dv).to(wide)
            x["n0"] = normal(b, h, dk).to(wide)
            x["m0"] = (normal(b, h) * (self.input_gate == "exp")).to(wide)
        return x

    def reset(self) -> Tensor | None:
        if not self.reset_every:
            return None
        reset = torch.zeros(self.batch, self.time, dtype=torch.bool)
        for row in range(self.batch):
            reset[row, row + 3 :: self.reset_every] = True
        return reset

    def options(self) -> dict[str, Any]:
        return {"input_gate": self.input_gate, "normalize": self.normalize, "eps": self.eps}

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


CASES = {
    "plain": Case(),
    "one_token": Case(time=1),
    "chunk_plus_one": Case(time=17, v_dim=5),
    "one_head": Case(batch=1, heads=1, time=20),
    "narrow": Case(qk_dim=1, v_dim=1, time=19),
    "odd_dims": Case(qk_dim=17, v_dim=3, time=23),
    "state": Case(with_state=True),
    "strong_forget": Case(forget_mean=-2.0, gate_std=3.0, with_state=True),
    "wide_gates": Case(gate_std=6.0, with_state=True),
    "reset": Case(reset_every=7, with_state=True),
    "forget_all": Case(forget_all_at=(5, 6, 20), with_state=True),
    "reset_and_forget": Case(reset_every=5, forget_all_at=(3, 13), with_state=True),
    "big_eps": Case(eps=0.1, with_state=True),
    "sigmoid": Case(input_gate="sigmoid", with_state=True),
    "sigmoid_reset": Case(input_gate="sigmoid", with_state=True, reset_every=6),
    "sigmoid_unnormalized": Case(input_gate="sigmoid", normalize=False, with_state=True),
}


def run(
    case: Case,
    inputs: dict[str, Tensor],
    backend: str,
    *,
    chunk_size: int | None = None,
    losses: str = "hcnm",
    **changes: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of a random linear loss on the chosen outputs (h and the states)."""
    x = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    state = mLSTMState(x["c0"], x["n0"], x["m0"]) if "c0" in x else None
    arguments: dict[str, Any] = {"reset": case.reset(), **case.options(), **changes}
    h, last = mlstm(
        x["q"],
        x["k"],
        x["v"],
        x["i"],
        x["f"],
        state=state,
        return_state=True,
        chunk_size=chunk_size,
        backend=backend,
        **arguments,
    )
    outputs = {"h": h, "c": last.c, "n": last.n, "m": last.m}
    g = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for name, y in outputs.items():
        weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
        if name in losses:
            loss = loss + (y.double() * weight).sum()
    grads: tuple[Tensor | None, ...] = (None,) * len(x)
    if loss.requires_grad:  # the sigmoid gate's last m is constant
        grads = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
    named = {
        name: torch.zeros_like(t) if grad is None else grad
        for (name, t), grad in zip(x.items(), grads, strict=True)
    }
    return {name: y.detach() for name, y in outputs.items()}, named


def conditioning(inputs: dict[str, Tensor], case: Case) -> Tensor:
    """Sum of |terms| of the normaliser over its size, per row (B, H, T): the digits that cancelling costs."""

    def normaliser(sign: Any) -> tuple[Tensor, Tensor]:
        x = {n: t.double() for n, t in inputs.items()}
        b, h, dk, dv = case.batch, case.heads, case.qk_dim, case.v_dim
        empty = {"c0": torch.zeros(b, h, dk, dv), "n0": torch.zeros(b, h, dk), "m0": torch.zeros(b, h)}
        state = [x.get(name, zero.double()) for name, zero in empty.items()]
        tensors = (sign(x["q"]), sign(x["k"]), x["v"], x["i"], x["f"], state[0], sign(state[1]), state[2])
        sigmoid = case.input_gate == "sigmoid"
        options = (case.reset(), sigmoid, case.normalize, case.eps, 16)
        return torch.ops.openxlstm.mlstm_chunkwise(*tensors, *options)[-2:]

    (size, _), (_, divisor) = normaliser(torch.abs), normaliser(lambda t: t)
    return size / divisor
