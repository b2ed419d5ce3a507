"""Exact counts from a configuration alone: parameters, training FLOPs, bytes of state.

FLOPs follow the scaling-law study (Beck et al., xLSTM Scaling Laws, arXiv 2510.02228): a multiply-add is 2,
the backward pass costs twice the forward pass, transcendental functions count 1, norms, skips and the
embedding look-up nothing; the mLSTM is charged as its chunkwise form ("first" mode of that study). The study
has no block stack; its maps, recurrent products and pointwise operations are charged in the same way.
"""

from __future__ import annotations

from openxlstm.layers.feedforward import FeedForwardConfig
from openxlstm.layers.mlstm_layer import mLSTMLayerConfig
from openxlstm.layers.slstm_layer import GATES, sLSTMLayerConfig
from openxlstm.models.block_stack import xLSTMBlockStackConfig
from openxlstm.models.large import xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModelConfig
from openxlstm.models.transformer import TransformerLMConfig

FLOAT32_BYTES = 4
SLSTM_CELL_FLOPS = 20  # pointwise operations per cell and step: gates, stabiliser, memory, normaliser, output
BLOCK_STACK_CHUNK_SIZE = 64  # the block stack has no such field; the study's value


def parameter_count(config: xLSTMBlockStackConfig | xLSTMLargeConfig | TransformerLMConfig) -> int:
    """Number of parameters of the model (tied matrices once)."""
    if isinstance(config, TransformerLMConfig):
        width = config.embedding_dim
        attention = 2 * width * width + 2 * width * config.kv_heads * config.head_dim
        block = attention + 3 * width * config.ffn_hidden_dim + 2 * width
        matrices = 1 if config.tie_weights else 2
        return config.num_blocks * block + width + matrices * config.vocab_size * width
    if isinstance(config, xLSTMLargeConfig):
        return _large_parameters(config)
    width = config.embedding_dim
    total = width if config.add_post_blocks_norm else 0
    for kind in config.block_map:
        if kind == "m":
            total += width + _mlstm_parameters(config.mlstm_block_config.mlstm)
        else:
            block = config.slstm_block_config
            total += width + _slstm_parameters(block.slstm)
            if block.feedforward is not None:
                total += width + _feedforward_parameters(block.feedforward)
    if isinstance(config, xLSTMLMModelConfig):
        total += (1 if config.tie_weights else 2) * config.vocab_size * width
    return total


def training_flops_per_token(
    config: xLSTMLMModelConfig | xLSTMLargeConfig | TransformerLMConfig,
    context_length: int,
    chunk_size: int | None = None,
) -> float:
    """FLOPs of forward and backward pass per token, for sequences of ``context_length`` tokens.

    Args:
        config: configuration of a language model.
        context_length: tokens per sequence.
        chunk_size: chunk length to charge the mLSTM for; None takes the configuration's (block stacks: 64).
    """
    return 3 * forward_flops(config, context_length, chunk_size) / context_length


def forward_flops(
    config: xLSTMLMModelConfig | xLSTMLargeConfig | TransformerLMConfig,
    context_length: int,
    chunk_size: int | None = None,
) -> float:
    """FLOPs of the forward pass over one sequence of ``context_length`` tokens."""
    time, width = context_length, config.embedding_dim
    logits = 2 * time * width * config.vocab_size
    if isinstance(config, TransformerLMConfig):
        hidden = config.ffn_hidden_dim
        linears = 4 * time * width * (width + config.kv_heads * config.head_dim)
        attention = time**2 * (2 * width + 2.5 * config.num_heads)  # causal half, softmax included
        feedforward = 6 * time * width * hidden + 2 * time * hidden
        return config.num_blocks * (linears + attention + feedforward) + logits
    if isinstance(config, xLSTMLargeConfig):
        heads, qk, v, hidden = config.num_heads, config.qk_dim, config.v_dim, config.ffn_hidden_dim
        linears = 2 * time * width * (2 * qk + v + 2 * heads) + 2 * time * width * v + time * v
        linears += 2 * time * width * v
        cell = mlstm_cell_flops(time, heads, qk // heads, v // heads, chunk_size or config.chunk_size)
        feedforward = 6 * time * width * hidden + 2 * time * hidden
        return config.num_blocks * (linears + cell + feedforward) + logits

    chunk_size = chunk_size or BLOCK_STACK_CHUNK_SIZE
    total = float(logits)
    for kind in config.block_map:
        if kind == "m":
            layer = config.mlstm_block_config.mlstm
            inner, heads = layer.inner_embedding_dim, layer.num_heads
            linears = (
                2 * width * 3 * inner + 2 * 3 * inner * layer.qkv_proj_blocksize + 2 * 3 * inner * 2 * heads
            )
            pointwise = (
                inner * (2 * layer.conv1d_kernel_size + 1) + inner * 4
            )  # convolution; skip, output gate
            dim = inner // heads
            total += time * (linears + pointwise) + mlstm_cell_flops(time, heads, dim, dim, chunk_size)
        else:
            block = config.slstm_block_config
            dim = width // block.slstm.num_heads
            maps = 2 * GATES * width * dim  # block-diagonal input maps; the recurrence has the same size
            pointwise = width * (2 * block.slstm.conv1d_kernel_size + 1) + SLSTM_CELL_FLOPS * width
            total += time * (2 * maps + pointwise)
            if block.feedforward is not None:
                hidden = block.feedforward.proj_up_dim
                total += 6 * time * width * hidden + 2 * time * hidden
    return total


def mlstm_cell_flops(time: int, heads: int, qk_dim: int, v_dim: int, chunk_size: int) -> float:
    """Forward FLOPs of the chunkwise mLSTM over one sequence, per-head widths ``qk_dim`` and ``v_dim``."""
    length, k, v = chunk_size, qk_dim, v_dim
    state = length * (length + 1) / 2 + 2 * length + 5 + 5 * length
    state += 2 * k * v + 4 * length * k * v + 3 * length * k + 2 * k + 4 * length * k
    output = length * (length + 1) / 2 + 6 * length**2 + 2 * length + 2 * length**2 * k + 2 * length**2
    output += 2 * length**2 * v + 2 * length**2 + 7 * length + 2 * length * v
    return heads * (time / length) * (state + output)


def state_bytes(
    config: xLSTMBlockStackConfig | xLSTMLargeConfig | TransformerLMConfig,
    batch_size: int = 1,
    context_length: int = 0,
    cache_bytes: int = FLOAT32_BYTES,
) -> int:
    """Bytes of the state after ``context_length`` tokens.

    That of a recurrent model is float32 and does not grow. A Transformer caches keys and values of
    ``cache_bytes`` bytes each, and one int64 per row and block.
    """
    if isinstance(config, TransformerLMConfig):
        cache = 2 * context_length * config.kv_heads * config.head_dim * cache_bytes
        return batch_size * config.num_blocks * (cache + 8)
    if isinstance(config, xLSTMLargeConfig):
        k, v = config.qk_dim // config.num_heads, config.v_dim // config.num_heads
        return FLOAT32_BYTES * batch_size * config.num_blocks * config.num_heads * (k * v + k + 1)
    numbers = 0
    for kind in config.block_map:
        if kind == "m":
            layer = config.mlstm_block_config.mlstm
            inner, heads = layer.inner_embedding_dim, layer.num_heads
            dim = inner // heads
            numbers += heads * (dim * dim + dim + 1) + max(layer.conv1d_kernel_size - 1, 0) * inner
        else:
            layer = config.slstm_block_config.slstm
            parts = 4 if layer.function == "slstm" else 2
            numbers += (parts + max(layer.conv1d_kernel_size - 1, 0)) * config.embedding_dim
    return FLOAT32_BYTES * batch_size * numbers


def _large_parameters(config: xLSTMLargeConfig) -> int:
    width, heads, qk, v = config.embedding_dim, config.num_heads, config.qk_dim, config.v_dim
    hidden, bias = config.ffn_hidden_dim, int(config.use_bias)
    norms = (1 + bias) * (2 * width + v)
    mlstm = width * (2 * qk + 3 * v) + 2 * (width + 1) * heads + bias * (2 * qk + 2 * v + width)
    feedforward = 3 * width * hidden + bias * (2 * hidden + width)
    out_norm = (1 + bias) * width if config.add_out_norm else 0
    matrices = 1 if config.tie_word_embeddings else 2
    return config.num_blocks * (norms + mlstm + feedforward) + out_norm + matrices * config.vocab_size * width


def _mlstm_parameters(layer: mLSTMLayerConfig) -> int:
    width, inner, heads = layer.embedding_dim, layer.inner_embedding_dim, layer.num_heads
    maps = 3 * width * inner + 3 * inner * layer.qkv_proj_blocksize
    biases = int(layer.bias) * (2 * inner + 3 * inner + width)
    gates = 2 * (3 * inner + 1) * heads
    return maps + biases + gates + _convolution_parameters(inner, layer.conv1d_kernel_size) + 2 * inner


def _slstm_parameters(layer: sLSTMLayerConfig) -> int:
    width = layer.embedding_dim
    maps = 2 * GATES * width * (width // layer.num_heads)  # input and recurrence
    norm = width if layer.group_norm_weight else 0
    return maps + GATES * width + _convolution_parameters(width, layer.conv1d_kernel_size) + norm


def _feedforward_parameters(config: FeedForwardConfig) -> int:
    width, hidden = config.embedding_dim, config.proj_up_dim
    return 3 * width * hidden + int(config.bias) * (2 * hidden + width)


def _convolution_parameters(channels: int, kernel_size: int) -> int:
    return channels * (kernel_size + 1) if kernel_size else 0
