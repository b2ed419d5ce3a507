"""A Llama with random weights as a GGUF file, for llama.cpp."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from runtimes.sizes import VOCABULARY, Llama

KINDS = {"f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "f32": Kind.F32}
BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "f32": 32}
"""Per weight, scales included."""
CONTEXT = 32768


def directory() -> Path:
    """Where files are kept between runs, beside the system's temporary ones."""
    path = Path(tempfile.gettempdir()) / "openxlstm-benchmark"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(shape: Llama, kind: str) -> Path:
    """The file of a shape with all matrices of one kind, the head too; written unless it is there.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of GGUF weights '{kind}': choose one of {', '.join(KINDS)}")
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()[:8]
    path = directory() / f"llama-{digest}-{kind}.gguf"
    if path.exists():
        return path
    partial = path.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, values in _tensors(shape):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, KINDS[kind]), raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def _tensors(shape: Llama) -> Iterator[tuple[str, np.ndarray]]:
    generator, width = np.random.default_rng(0), shape.width

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return 0.02 * generator.standard_normal((outputs, inputs), dtype=np.float32)

    yield "token_embd.weight", matrix(VOCABULARY, width)
    for layer in range(shape.layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", matrix(width, width)
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{layer}.{name}.weight", matrix(shape.hidden, width)
        yield f"blk.{layer}.ffn_down.weight", matrix(width, shape.hidden)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(width, np.float32)
    yield "output_norm.weight", np.ones(width, np.float32)
    yield "output.weight", matrix(VOCABULARY, width)
