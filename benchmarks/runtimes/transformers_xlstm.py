"""`transformers`: its xLSTM, with the kernels that run without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

from openxlstm.cli.bench import SIZES
from turns import Work

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model:
    """A model with random weights, as many as ours."""

    def __init__(self, size: str, dtype: str, threads: int) -> None:
        ours, self.dtype = SIZES[size], TYPES[dtype]
        config = xLSTMConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.embedding_dim,
            num_hidden_layers=ours.num_blocks,
            num_heads=ours.num_heads,
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            mode="inference",
            autocast_kernel_dtype=dtype,
        )
        model: Any = xLSTMForCausalLM(config)
        self.model = model.to(self.dtype).eval()
        cell = ours.qk_dim * ours.v_dim // ours.num_heads + ours.qk_dim + ours.num_heads
        self.state_bytes = (
            ours.num_blocks * cell * self.dtype.itemsize
        )  # its cache has the type of the weights

    def decode(self, context: int, batch: int) -> Work:
        """Steps from a state that has read ``context`` tokens."""
        cache = self.model(torch.randint(50304, (batch, context or 2)), use_cache=True).cache_params
        tokens = torch.full((batch, 1), 5)

        def call() -> None:
            self.model(tokens, cache_params=cache, use_cache=True)

        weights = sum(p.nbytes for p in self.model.parameters())
        weights -= self.model.get_input_embeddings().weight.nbytes
        return Work(call, batch, bytes=weights + 2 * batch * self.state_bytes)

    def prompt(self, length: int) -> Work:
        """A prompt; it computes logits at every position."""
        tokens = torch.randint(50304, (1, length))

        def read(tokens: torch.Tensor = tokens) -> None:
            self.model(tokens, use_cache=True)

        read(tokens[:, :130])
        return Work(read, length, rate_dtype=self.dtype)
