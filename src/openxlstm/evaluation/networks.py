"""Small networks to compare, by name: one dial for width, one for the number of blocks.

xLSTM blocks are the published ones of the block stack with one head; ``slstm-no-recurrence`` is the sLSTM
block with its recurrent matrix fixed to zero, everything else equal: what is lost is memory mixing alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openxlstm.config import nearest_name
from openxlstm.models import build_model


@dataclass(frozen=True)
class Network:
    """A kind of network."""

    name: str
    summary: str
    blocks: int
    """Blocks unless said otherwise."""
    build: Callable[[int, int, int], nn.Module]
    """(vocab_size, width, blocks) -> freshly initialised network."""
    multiple: int = 8
    """Widths are multiples of this."""


def _xlstm(slstm_at: Callable[[int], list[int]]) -> Callable[[int, int, int], nn.Module]:
    def build(vocab_size: int, width: int, blocks: int) -> nn.Module:
        values: dict[str, Any] = {
            "model_type": "xlstm_lm",
            "vocab_size": vocab_size,
            "embedding_dim": width,
            "num_blocks": blocks,
            "slstm_at": slstm_at(blocks),
            "mlstm_block": {"mlstm": {"num_heads": 1, "round_proj_up_to_multiple_of": 8}},
            "slstm_block": {"slstm": {"num_heads": 1}, "feedforward": {"round_proj_up_to_multiple_of": 8}},
        }
        return build_model(values)

    return build


def _without_recurrence(vocab_size: int, width: int, blocks: int) -> nn.Module:
    model = _xlstm(lambda count: list(range(count)))(vocab_size, width, blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("_recurrent_kernel_"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


def _classical(cell: Any) -> Callable[[int, int, int], nn.Module]:
    def build(vocab_size: int, width: int, blocks: int) -> nn.Module:
        from openxlstm.evaluation.recurrent_lm import RecurrentLM, RecurrentLMConfig

        return RecurrentLM(RecurrentLMConfig(cell, vocab_size, width, blocks))

    return build


def _transformer(vocab_size: int, width: int, blocks: int) -> nn.Module:
    return build_model(
        {
            "model_type": "transformer_lm",
            "vocab_size": vocab_size,
            "embedding_dim": width,
            "num_blocks": blocks,
            "num_heads": 2,
            "ffn_round_up_to_multiple_of": 8,
        }
    )


def _mamba(vocab_size: int, width: int, blocks: int) -> nn.Module:
    from openxlstm.evaluation.mamba import MambaLM

    return MambaLM(vocab_size, width, blocks)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("slstm", "sLSTM blocks, full recurrent matrix", 1, _xlstm(lambda n: list(range(n)))),
        Network(
            "slstm-no-recurrence", "the same with the recurrent matrix fixed to 0", 1, _without_recurrence
        ),
        Network("mlstm", "mLSTM blocks", 2, _xlstm(lambda n: [])),
        Network("xlstm-1-1", "mLSTM and sLSTM blocks in turn", 2, _xlstm(lambda n: list(range(1, n, 2)))),
        Network(
            "xlstm-3-1",
            "an sLSTM block after every three mLSTM blocks",
            4,
            _xlstm(lambda n: list(range(3, n, 4))),
        ),
        Network("lstm", "LSTM, as nn.LSTM", 1, _classical("lstm")),
        Network("gru", "GRU, as nn.GRU", 1, _classical("gru")),
        Network("transformer", "Llama-style Transformer, rotary positions", 2, _transformer),
        Network("mamba", "Mamba, through transformers", 2, _mamba),
    )
}
"""Name to network."""


def get_network(name: str) -> Network:
    """The network of that name; underscores count as hyphens.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    key = name.lower().replace("_", "-")
    if key not in NETWORKS:
        raise ValueError(
            f"unknown model {name!r}.{nearest_name(key, NETWORKS)} Models: {', '.join(NETWORKS)}"
        )
    return NETWORKS[key]


def available(name: str) -> str | None:
    """Why the network cannot run here, or None if it can."""
    if name == "mamba" and importlib.util.find_spec("transformers") is None:
        return "it needs transformers (pip install 'openxlstm[hf]')"
    return None


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, each once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def width_for(name: str, vocab_size: int, parameters: int, blocks: int | None = None) -> int:
    """The width whose network has the number of trainable parameters nearest to ``parameters``.

    Raises:
        ValueError: even the narrowest network has more than twice as many.
    """
    network = get_network(name)
    blocks = network.blocks if blocks is None else blocks

    def size(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(network.build(vocab_size, width, blocks))

    width = network.multiple
    smallest = size(width)
    if smallest > 2 * parameters:
        raise ValueError(
            f"the narrowest {name} of {blocks} blocks over {vocab_size} tokens has {smallest:,} parameters; "
            f"{parameters:,} are too few for it"
        )
    best = width, smallest
    while best[1] < parameters:
        width += network.multiple
        count = size(width)
        if abs(count - parameters) <= abs(best[1] - parameters):
            best = width, count
        if count >= parameters:
            break
    return best[0]
