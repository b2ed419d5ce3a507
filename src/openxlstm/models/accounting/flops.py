"""Training FLOPs of whole models, per component and under both published conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openxlstm.layers.slstm_layer import GATES
from openxlstm.models.accounting.cells import (
    AttentionForm,
    Flops,
    MLSTMForm,
    attention_flops,
    least_mlstm_flops,
    mlstm_backward_flops,
    mlstm_cell_flops,
)
from openxlstm.models.large import xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModelConfig
from openxlstm.models.transformer import TransformerLMConfig

LanguageModelConfig = xLSTMLMModelConfig | xLSTMLargeConfig | TransformerLMConfig
SLSTM_CELL_FLOPS = 20  # pointwise operations per cell and step: gates, stabiliser, memory, normaliser, output
BLOCK_STACK_CHUNK_SIZE = 64  # the block stack has no such field; the study's value


@dataclass(frozen=True)
class Counting:
    """What is charged how. The default is that of the published training runs."""

    mlstm: MLSTMForm = "first"
    """Form of the mLSTM; see :func:`mlstm_cell_flops`."""
    attention: AttentionForm = "distill"
    """Form of attention; see :func:`attention_flops`."""
    backward: Literal["double", "counted"] = "double"
    """"double": the backward pass is twice the forward pass. "counted": that of the mLSTM cell is counted
    operation by operation, everything else is doubled."""
    causal_factor: float = 0.75
    """Share of the square that causal tiles of the mLSTM compute."""
    chunk_size: int | None = None
    """Chunk length to charge the mLSTM for; None takes the configuration's (block stacks: 64)."""


PUBLISHED = Counting()


def forward_components(
    config: LanguageModelConfig, context_length: int, counting: Counting = PUBLISHED
) -> dict[str, Flops]:
    """FLOPs of the forward pass over one sequence, by component, summed over the blocks.

    Returns:
        ``projections`` (linear maps around the mixers, with the output gate), ``convolution``, ``mixer``,
        ``feedforward`` and ``head`` (logits at every position).
    """
    time, width = context_length, config.embedding_dim
    parts = {name: Flops(0.0) for name in ("projections", "convolution", "mixer", "feedforward")}
    if isinstance(config, TransformerLMConfig):
        kv = config.kv_heads * config.head_dim
        parts["projections"] = Flops(4 * time * width * (width + kv))
        parts["mixer"] = attention_flops(time, config.num_heads, config.head_dim, counting.attention)
        parts["feedforward"] = _gated(time, width, config.ffn_hidden_dim)
        parts = {name: part.times(config.num_blocks) for name, part in parts.items()}
    elif isinstance(config, xLSTMLargeConfig):
        heads, qk, v = config.num_heads, config.qk_dim, config.v_dim
        products = 2 * time * width * (2 * qk + v + 2 * heads) + 4 * time * width * v
        parts["projections"] = Flops(products, time * v)
        parts["mixer"] = mlstm_cell_flops(
            *_large_cell(config, time, counting), counting.mlstm, counting.causal_factor
        )
        parts["feedforward"] = _gated(time, width, config.ffn_hidden_dim)
        parts = {name: part.times(config.num_blocks) for name, part in parts.items()}
    else:
        for kind in config.block_map:
            for name, part in (_stack_mlstm if kind == "m" else _stack_slstm)(config, time, counting).items():
                parts[name] = parts[name].plus(part)
    parts["head"] = Flops(2 * time * width * config.vocab_size)
    return parts


def forward_flops(config: LanguageModelConfig, context_length: int, counting: Counting = PUBLISHED) -> float:
    """FLOPs of the forward pass over one sequence of ``context_length`` tokens."""
    return sum(part.total for part in forward_components(config, context_length, counting).values())


def least_prompt_flops(config: xLSTMLargeConfig | TransformerLMConfig, time: int) -> float:
    """Matrix products that reading a prompt of ``time`` tokens cannot leave out, for one row.

    Linear maps of every token, the mLSTM by :func:`least_mlstm_flops` or the exact causal triangle of
    attention, and the logits of the last position. The yardstick of the prompt benchmarks.
    """
    parts = forward_components(config, time)
    if isinstance(config, TransformerLMConfig):
        mixer = 2.0 * time * (time + 1) * config.num_heads * config.head_dim
    else:
        heads = config.num_heads
        mixer = least_mlstm_flops(time, heads, config.qk_dim // heads, config.v_dim // heads, backward=False)
    linear = parts["projections"].products + parts["feedforward"].products
    return linear + config.num_blocks * mixer + parts["head"].products / time


def training_flops_per_token(
    config: LanguageModelConfig, context_length: int, counting: Counting = PUBLISHED
) -> float:
    """FLOPs of forward and backward pass per token, for sequences of ``context_length`` tokens.

    Raises:
        ValueError: ``context_length`` is not positive.
    """
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    total = 3 * forward_flops(config, context_length, counting)
    if counting.backward == "counted":
        for cell in _mlstm_cells(config, context_length, counting):
            forward = mlstm_cell_flops(*cell, counting.mlstm, counting.causal_factor).total
            total += mlstm_backward_flops(*cell, causal_factor=counting.causal_factor).total - 2 * forward
    return total / context_length


def _mlstm_cells(
    config: LanguageModelConfig, time: int, counting: Counting
) -> list[tuple[int, int, int, int, int]]:
    """Arguments of the cell formulas for every mLSTM of the model."""
    if isinstance(config, xLSTMLargeConfig):
        return [_large_cell(config, time, counting)] * config.num_blocks
    if isinstance(config, TransformerLMConfig):
        return []
    return [_stack_cell(config, time, counting)] * config.block_map.count("m")


def _large_cell(config: xLSTMLargeConfig, time: int, counting: Counting) -> tuple[int, int, int, int, int]:
    heads = config.num_heads
    chunk_size = counting.chunk_size or config.chunk_size
    return time, heads, config.qk_dim // heads, config.v_dim // heads, chunk_size


def _stack_cell(config: xLSTMLMModelConfig, time: int, counting: Counting) -> tuple[int, int, int, int, int]:
    layer = config.mlstm_block_config.mlstm
    dim = layer.inner_embedding_dim // layer.num_heads
    return time, layer.num_heads, dim, dim, counting.chunk_size or BLOCK_STACK_CHUNK_SIZE


def _gated(time: int, width: int, hidden: int) -> Flops:
    return Flops(6 * time * width * hidden, 2 * time * hidden)


def _convolution(time: int, channels: int, kernel_size: int) -> Flops:
    return Flops(0.0, time * channels * (2 * kernel_size + 1))  # depthwise: no matrix product


def _stack_mlstm(config: xLSTMLMModelConfig, time: int, counting: Counting) -> dict[str, Flops]:
    layer, width = config.mlstm_block_config.mlstm, config.embedding_dim
    inner = layer.inner_embedding_dim
    products = 6 * width * inner + 6 * inner * layer.qkv_proj_blocksize + 12 * inner * layer.num_heads
    return {
        "projections": Flops(time * products, time * 4 * inner),  # learnable skip, output gate
        "convolution": _convolution(time, inner, layer.conv1d_kernel_size),
        "mixer": mlstm_cell_flops(
            *_stack_cell(config, time, counting), counting.mlstm, counting.causal_factor
        ),  # pyright: ignore
    }


def _stack_slstm(config: xLSTMLMModelConfig, time: int, counting: Counting) -> dict[str, Flops]:
    del counting  # nothing about it is a matter of convention
    block, width = config.slstm_block_config, config.embedding_dim
    maps = 2 * GATES * width * (width // block.slstm.num_heads)  # input maps; the recurrence has the same
    parts = {
        "projections": Flops(time * maps),
        "convolution": _convolution(time, width, block.slstm.conv1d_kernel_size),
        "mixer": Flops(time * maps, time * SLSTM_CELL_FLOPS * width),
    }
    if block.feedforward is not None:
        parts["feedforward"] = _gated(time, width, block.feedforward.proj_up_dim)
    return parts
