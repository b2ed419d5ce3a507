"""The published `xlstm` package's `xLSTMLarge`, with the kernels that run without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

from openxlstm.cli.bench import SIZES
from turns import Work


class Model:
    """A model with random weights, as many as ours; bfloat16 is its own way, autocast of float32 weights."""

    def __init__(self, size: str, dtype: str, threads: int) -> None:
        ours = SIZES[size]
        config = xLSTMLargeConfig(
            embedding_dim=ours.embedding_dim,
            num_heads=ours.num_heads,
            num_blocks=ours.num_blocks,
            vocab_size=ours.vocab_size,
            return_last_states=True,
            mode="inference",
            weight_mode="fused",
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
        )
        self.model: Any = xLSTMLarge(config).eval()
        self.weight_size = 2 if dtype == "bfloat16" else 4
        if dtype == "bfloat16":
            torch.autocast("cpu", torch.bfloat16).__enter__()  # for good: it keeps converted weights
        cell = ours.qk_dim * ours.v_dim // ours.num_heads + ours.qk_dim + ours.num_heads
        self.state_bytes = 4 * ours.num_blocks * cell

    def decode(self, context: int, batch: int) -> Work:
        """Steps from a state that has read ``context`` tokens."""
        _, state = self.model(torch.randint(50304, (batch, context or 2)), None)
        tokens = torch.full((batch, 1), 5)

        def call() -> None:
            nonlocal state
            _, state = self.model(tokens, state)

        weights = sum(p.numel() for p in self.model.parameters()) - self.model.embedding.weight.numel()
        return Work(call, batch, bytes=weights * self.weight_size + 2 * batch * self.state_bytes)

    def prompt(self, length: int) -> Work:
        """A prompt; it computes logits at every position."""
        tokens = torch.randint(50304, (1, length))

        def read(tokens: torch.Tensor = tokens) -> None:
            self.model(tokens, None)

        read(tokens[:, :130])
        return Work(read, length)
