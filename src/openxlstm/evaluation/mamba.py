"""Mamba as a baseline, through ``transformers``. The only module of this package that imports it.

Reads whole strings: the cache of that implementation takes single tokens only, so there is no streaming here.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn


class MambaLM(nn.Module):
    """A Mamba language model (Gu and Dao, arXiv 2312.00752) with fresh weights.

    Args:
        vocab_size: number of tokens V.
        width: width of the residual stream.
        blocks: number of blocks.

    Raises:
        ImportError: ``transformers`` is not installed (``pip install 'openxlstm[hf]'``).
    """

    def __init__(self, vocab_size: int, width: int, blocks: int) -> None:
        super().__init__()
        from transformers import MambaConfig, MambaForCausalLM

        logging.getLogger("transformers").setLevel(logging.ERROR)  # it announces its portable path every time
        config = MambaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=blocks,
            use_cache=False,
            use_mambapy=True,  # a parallel scan instead of a loop over time, where mambapy is installed
            pad_token_id=0,
        )
        self.vocab_size = vocab_size
        self.model: Any = MambaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices decay; embedding, state matrix, convolution, norms and biases do not."""
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            matrix = parameter.ndim == 2 and not name.endswith("A_log") and "embeddings" not in name
            (decay if matrix else rest).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
