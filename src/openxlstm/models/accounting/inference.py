"""FLOPs and bytes of inference: reading a prompt, and one step of decoding.

FLOPs include norms (3 per number), skips (1) and gates, as the study's inference part does; logits are
computed for the last position only. Bytes are those that must cross between memory and cores when every
operation reads its inputs and writes its outputs once: weights once per call, activations once in and once
out of each linear map, states in and out, cached keys and values once per step.

Two counts differ from the study's program on purpose: both gates of the mLSTM are charged (it charges one),
and weights are charged in every step (it divides them by the number of steps).
"""

from __future__ import annotations

from dataclasses import dataclass

from openxlstm.layers.slstm_layer import GATES
from openxlstm.models.accounting.cells import mlstm_cell_flops
from openxlstm.models.accounting.flops import (
    BLOCK_STACK_CHUNK_SIZE,
    SLSTM_CELL_FLOPS,
    LanguageModelConfig,
)
from openxlstm.models.accounting.parameters import parameter_count, state_bytes
from openxlstm.models.large import xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModelConfig
from openxlstm.models.transformer import TransformerLMConfig

ATTENTION_PREFILL_SHARE = 0.65  # of the square: tiles on the diagonal are computed whole
SOFTMAX_FLOPS = 5  # per score


@dataclass(frozen=True)
class Storage:
    """Bytes per number."""

    activation: float = 2
    """Activations and cached keys and values."""
    weight: float = 2
    """Weights."""
    state: float = 4
    """Recurrent states."""


@dataclass(frozen=True)
class Cost:
    """What one call costs."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """Least time on a device with these limits."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)


BFLOAT16 = Storage()


def prefill_cost(
    config: LanguageModelConfig,
    batch_size: int,
    time: int,
    storage: Storage = BFLOAT16,
    chunk_size: int | None = None,
) -> Cost:
    """Reading ``time`` tokens in each of ``batch_size`` rows, from the empty state to the first logits.

    Args:
        config: configuration of a language model.
        batch_size: rows B.
        time: tokens per row T, at least 1.
        storage: bytes per number.
        chunk_size: chunk length of the mLSTM; None takes the configuration's (block stacks: 64).
    """
    _check(batch_size=batch_size, time=time)
    flops = bytes_moved = 0.0
    for block in _blocks(config, storage, chunk_size):
        flops += time * block.token_flops + block.sequence_flops(time)
        bytes_moved += time * block.token_bytes + block.sequence_bytes(time)
    return _with_ends(config, batch_size, time, flops, bytes_moved, storage)


def decode_cost(
    config: LanguageModelConfig, batch_size: int, context_length: int, storage: Storage = BFLOAT16
) -> Cost:
    """One more token in each of ``batch_size`` rows that hold ``context_length`` tokens."""
    _check(batch_size=batch_size)
    if context_length < 0:
        raise ValueError(f"context_length must be 0 or more, got {context_length}")
    flops = bytes_moved = 0.0
    for block in _blocks(config, storage, None):
        flops += block.token_flops + block.step_flops(context_length)
        bytes_moved += block.token_bytes + block.step_bytes(context_length)
    return _with_ends(config, batch_size, 1, flops, bytes_moved, storage)


def _check(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _with_ends(
    config: LanguageModelConfig, batch: int, time: int, flops: float, bytes_moved: float, storage: Storage
) -> Cost:
    """Blocks of one row, plus embedding, last norm, logits of the last position, and the weights once."""
    width, vocabulary = config.embedding_dim, config.vocab_size
    flops += 2 * width * vocabulary + 3 * width
    bytes_moved += time * width * storage.weight + (2 * width + vocabulary) * storage.activation
    tied = config.tie_word_embeddings if isinstance(config, xLSTMLargeConfig) else config.tie_weights
    weights = parameter_count(config) - (0 if tied else width * vocabulary)  # rows of the embedding: above
    return Cost(batch * flops, batch * bytes_moved + weights * storage.weight)


class _Block:
    """Costs of one block for one row: ``token_*`` per position, the rest is the mixer."""

    token_flops: float
    token_bytes: float

    def sequence_flops(self, time: int) -> float: ...
    def sequence_bytes(self, time: int) -> float: ...
    def step_flops(self, context: int) -> float: ...
    def step_bytes(self, context: int) -> float: ...


class _MLSTM(_Block):
    """The cell: chunkwise for sequences, recurrent for steps."""

    def __init__(self, heads: int, k: int, v: int, chunk: int, storage: Storage) -> None:
        self.heads, self.k, self.v, self.chunk, self.storage = heads, k, v, chunk, storage

    def sequence_flops(self, time: int) -> float:
        return mlstm_cell_flops(time, self.heads, self.k, self.v, self.chunk, "tfla").total

    def sequence_bytes(self, time: int) -> float:
        length, k, v, store = self.chunk, self.k, self.v, self.storage
        state = (k * v + k + 1) * store.state
        chunk = (length * (k + v) + 2 * length) * store.activation + state  # states of all chunks
        chunk += (length * (2 * k + v) + 2 * length) * store.activation + state  # read them again
        chunk += length * v * store.activation + 2 * length * store.state
        return self.heads * (time / length) * chunk

    def step_flops(self, context: int) -> float:
        return mlstm_cell_flops(1, self.heads, self.k, self.v, 1, "recurrent").total

    def step_bytes(self, context: int) -> float:
        k, v, store = self.k, self.v, self.storage
        return self.heads * ((2 * k + 2 * v + 2) * store.activation + 2 * (k * v + k + 1) * store.state)


class _LargeBlock(_MLSTM):
    def __init__(self, config: xLSTMLargeConfig, storage: Storage, chunk_size: int | None) -> None:
        d, f, heads, qk, v = (
            config.embedding_dim, config.ffn_hidden_dim, config.num_heads, config.qk_dim, config.v_dim
        )  # fmt: skip
        super().__init__(heads, qk // heads, v // heads, chunk_size or config.chunk_size, storage)
        mixer = 4 * d + 2 * d * (2 * qk + v) + 4 * d * heads + 2 * heads + 4 * d * v + v + 3 * v
        self.token_flops = mixer + 4 * d + 6 * d * f + 2 * f
        numbers = d + (d + 2 * qk + v) + 2 * (d + heads) + (d + v) + v + (d + v) + d + 3 * (d + f)
        self.token_bytes = numbers * storage.activation


class _TransformerBlock(_Block):
    def __init__(self, config: TransformerLMConfig, storage: Storage) -> None:
        d, f, self.heads = config.embedding_dim, config.ffn_hidden_dim, config.num_heads
        self.head_dim, self.storage = config.head_dim, storage
        self.kv = 2 * config.kv_heads * config.head_dim  # keys and values of one position
        mixer = 4 * d + 2 * d * (d + self.kv) + 2 * d * d
        self.token_flops = mixer + 4 * d + 6 * d * f + 2 * f
        self.token_bytes = (d + (d + d + self.kv) + 2 * d + d + 3 * (d + f)) * storage.activation

    def sequence_flops(self, time: int) -> float:
        per_score = 2 * self.heads * (2 * self.head_dim + 0.5 * SOFTMAX_FLOPS)
        return ATTENTION_PREFILL_SHARE * time**2 * per_score

    def sequence_bytes(self, time: int) -> float:
        return time * (2 * self.heads * self.head_dim + self.kv) * self.storage.activation

    def step_flops(self, context: int) -> float:
        return 2 * self.heads * (2 * self.head_dim + 0.5 * SOFTMAX_FLOPS) * (context + 1)

    def step_bytes(self, context: int) -> float:
        return (2 * self.heads * self.head_dim + self.kv * (context + 2)) * self.storage.activation


class _StackMLSTM(_MLSTM):
    def __init__(self, config: xLSTMLMModelConfig, storage: Storage, chunk_size: int | None) -> None:
        layer, d = config.mlstm_block_config.mlstm, config.embedding_dim
        inner, heads, kernel = layer.inner_embedding_dim, layer.num_heads, layer.conv1d_kernel_size
        super().__init__(heads, inner // heads, inner // heads, chunk_size or BLOCK_STACK_CHUNK_SIZE, storage)
        self.kernel_numbers = max(kernel - 1, 0) * inner
        maps = 6 * d * inner + 6 * inner * layer.qkv_proj_blocksize + 12 * inner * heads + 2 * heads
        self.token_flops = 4 * d + maps + inner * (2 * kernel + 1) + 3 * inner + 4 * inner
        numbers = d + (d + 2 * inner) + 2 * inner + 6 * inner + 2 * (3 * inner + heads) + 4 * inner
        self.token_bytes = (numbers + inner + d) * storage.activation

    def step_bytes(self, context: int) -> float:
        return super().step_bytes(context) + 2 * self.kernel_numbers * self.storage.state


class _StackSLSTM(_Block):
    def __init__(self, config: xLSTMLMModelConfig, storage: Storage) -> None:
        block, d = config.slstm_block_config, config.embedding_dim
        layer = block.slstm
        kernel = layer.conv1d_kernel_size
        dim = d // layer.num_heads
        maps = 2 * 2 * GATES * d * dim
        self.token_flops = 4 * d + maps + d * (2 * kernel + 1) + SLSTM_CELL_FLOPS * d + 3 * d
        numbers = 2 * d + 2 * d + (GATES * d + GATES * d) + (GATES + 1) * d + 2 * d
        if block.feedforward is not None:
            f = block.feedforward.proj_up_dim
            self.token_flops += 4 * d + 6 * d * f + 2 * f
            numbers += 2 * d + (d + 2 * f) + 2 * f + (f + d)
        self.token_bytes = numbers * storage.activation
        parts = 4 if layer.function == "slstm" else 2
        self.state = (parts + max(kernel - 1, 0)) * d * storage.state

    def sequence_flops(self, time: int) -> float:
        return 0.0

    def sequence_bytes(self, time: int) -> float:
        return self.state

    def step_flops(self, context: int) -> float:
        return 0.0

    def step_bytes(self, context: int) -> float:
        return 2 * self.state


def _blocks(config: LanguageModelConfig, storage: Storage, chunk_size: int | None) -> list[_Block]:
    if isinstance(config, xLSTMLargeConfig):
        return [_LargeBlock(config, storage, chunk_size)] * config.num_blocks
    if isinstance(config, TransformerLMConfig):
        return [_TransformerBlock(config, storage)] * config.num_blocks
    kinds: dict[str, _Block] = {}
    for kind in set(config.block_map):
        kinds[kind] = (
            _StackMLSTM(config, storage, chunk_size) if kind == "m" else _StackSLSTM(config, storage)
        )
    return [kinds[kind] for kind in config.block_map]


def inference_memory(
    config: LanguageModelConfig, batch_size: int, context_length: int, storage: Storage = BFLOAT16
) -> float:
    """Bytes that weights and the states or caches of ``batch_size`` rows occupy."""
    state = state_bytes(config, batch_size, context_length, cache_bytes=int(storage.activation))
    return parameter_count(config) * storage.weight + state
