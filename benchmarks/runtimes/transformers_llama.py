"""`transformers`: a Llama of the same size, with its default attention and cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from openxlstm.models.accounting import least_prompt_flops
from runtimes.sizes import LLAMAS, VOCABULARY
from turns import Work

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model:
    """A model with random weights."""

    def __init__(self, size: str, dtype: str, threads: int) -> None:
        self.shape, self.dtype = LLAMAS[size], TYPES[dtype]
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.shape.width,
            intermediate_size=self.shape.hidden,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            max_position_embeddings=32768,
        )
        model: Any = LlamaForCausalLM(config)
        self.model = model.to(self.dtype).eval()

    def decode(self, context: int, batch: int) -> Work:
        """Steps after a cache of random numbers: what they cost does not depend on the values."""
        tokens = torch.full((batch, 1), 5)
        cache: Any = DynamicCache(config=self.model.config)
        head = self.shape.width // self.shape.heads
        for layer in range(self.shape.layers):
            block = torch.randn(batch, self.shape.heads, context, head).to(self.dtype)
            cache.update(block, block.clone(), layer)

        def restart() -> None:
            cache.crop(context - cache.get_seq_length())

        def call() -> None:
            self.model(tokens, past_key_values=cache, use_cache=True)

        numbers = self.shape.weights + batch * context * self.shape.cache_numbers
        return Work(call, batch, restart, bytes=numbers * self.dtype.itemsize)

    def prompt(self, length: int) -> Work:
        """A prompt, with the logits of its last token only."""
        tokens = torch.randint(VOCABULARY, (1, length))

        def read(tokens: torch.Tensor = tokens) -> None:
            self.model(tokens, use_cache=True, logits_to_keep=1)

        read(tokens[:, :130])
        return Work(read, length, flops=least_prompt_flops(self.shape.config, length), rate_dtype=self.dtype)
