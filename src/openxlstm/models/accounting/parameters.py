"""Parameters and bytes of state, from a configuration alone."""

from __future__ import annotations

from openxlstm.layers.feedforward import FeedForwardConfig
from openxlstm.layers.mlstm_layer import mLSTMLayerConfig
from openxlstm.layers.slstm_layer import GATES, sLSTMLayerConfig
from openxlstm.models.block_stack import xLSTMBlockStackConfig
from openxlstm.models.large import xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModelConfig
from openxlstm.models.transformer import TransformerLMConfig

ModelConfig = xLSTMBlockStackConfig | xLSTMLargeConfig | TransformerLMConfig
FLOAT32_BYTES = 4


def parameter_count(config: ModelConfig) -> int:
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


def state_bytes(
    config: ModelConfig,
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
