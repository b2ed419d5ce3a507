"""Random inputs for every cell, shared by the tests of the recurrent operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from openxlstm.ops.rnn import rnn
from openxlstm.ops.rnn.cells import CELLS

FLOORS = [("slstm", None), ("slstm", 1.0), ("lstm", None), ("gru", None), ("elman", None)]


class Case(NamedTuple):
    """Arguments of one call."""

    cell: str
    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Any
    floor: float | None

    def tensors(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [self.x, self.weight, self.bias, *self.state]

    def run(self, *tensors: Tensor, backend: str = "auto", **options: Any) -> tuple[Tensor, ...]:
        """h and the leaves of the last state, for the case's tensors or for others in their place."""
        x, weight, bias, *leaves = tensors or self.tensors()
        h, last = rnn(
            self.cell,
            x,
            weight,
            bias,
            state=type(self.state)(*leaves),
            return_state=True,
            normalizer_floor=self.floor,
            backend=backend,
            **options,
        )
        return (h, *last)

    def run_with_gradients(
        self, *, backend: str = "auto", on: str = "both", **options: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and all gradients of a random loss on h (``on="h"``), on the last state, or on both."""
        inputs = [t.detach().clone().requires_grad_() for t in self.tensors()]
        outputs = self.run(*inputs, backend=backend, **options)
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs
        ]
        chosen = {"h": slice(0, 1), "state": slice(1, None), "both": slice(0, None)}[on]
        loss = sum((o * w).sum() for o, w in zip(outputs[chosen], weights[chosen], strict=True))
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return [o.detach() for o in outputs], list(gradients)


@pytest.fixture(params=FLOORS, ids=lambda p: p[0] if p[1] is None else f"{p[0]}-floor")
def cell_and_floor(request: pytest.FixtureRequest) -> tuple[str, float | None]:
    """Every cell, the sLSTM in both of its conventions."""
    return request.param


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Build a case: float64 and a state in mid-document unless told otherwise."""

    def make(
        cell: str,
        shape: tuple[int, int, int, int] = (2, 5, 2, 3),
        *,
        floor: float | None = None,
        dtype: torch.dtype = torch.float64,
        empty: bool = False,
        seed: int = 0,
        states: int | None = None,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        kind = CELLS[cell]
        batch, time, heads, d = shape
        leaves = [normal(states or batch, heads, d).tanh() for _ in kind.state_type._fields]
        if cell == "slstm":
            leaves[2] = leaves[2].abs() * 2 + 0.1  # the normaliser; partly under the floor of 1
        if empty:
            leaves = [torch.zeros_like(leaf) for leaf in leaves]
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return Case(
            cell,
            (1.5 * normal(batch, time, len(kind.input_gates), heads, d)).to(dtype),
            (normal(len(kind.recurrent_gates), heads, d, d) / d**0.5).to(work),
            normal(len(kind.bias_gates), heads, d).to(work),
            kind.state_type(*(leaf.to(work) for leaf in leaves)),
            floor,
        )

    return make
