"""Quantised checkpoints: :func:`quantize_checkpoint` writes them, ``load_pretrained`` maps them into memory.

A quantised checkpoint is one of openxlstm's own layout whose ``config.json`` has a section ``quantization``
(the fields of :class:`openxlstm.layers.quantized.Quantization` and a format number) and whose quantised
matrices are two tensors each, ``X.weight`` (codes) and ``X.scales``, in the layout that the kernels read.
Nothing is repacked at load: codes are used where the file is mapped. xLSTMLarge models are stored with single
maps, not fused ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm.checkpoint.hub import locate
from openxlstm.checkpoint.pretrained import build, write_checkpoint
from openxlstm.checkpoint.reading import Checkpoint, read_checkpoint
from openxlstm.checkpoint.weights import LazyTensor, Weights
from openxlstm.checkpoint.writing import DEFAULT_SHARD_BYTES
from openxlstm.layers.quantized import Quantization, empty_quantized, quantizable
from openxlstm.ops.quantization import quantize
from openxlstm.runtime import resolve_dtype

MODEL_TYPES = ("xlstm_large", "xlstm_lm", "xlstm_block_stack")
CALIBRATION_TOKENS = 32768
CALIBRATION_LENGTH = 1024


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    quantization: Quantization,
    *,
    calibration: Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    on_matrix: Callable[[int, int], Any] | None = None,
) -> None:
    """Quantise a checkpoint, matrix by matrix, without ever holding the whole model.

    Args:
        source: anything that :func:`openxlstm.load_pretrained` reads.
        target: directory to write; it appears whole or not at all.
        quantization: the scheme.
        calibration: texts for ``method="importance"``; the model reads their first 32,768 tokens.
        dtype: floating point type of everything that is not quantised; None keeps what is stored.
        max_shard_bytes: size at which the weights are cut into several files.
        on_matrix: called with the number of matrices done and their total, for a progress bar.

    Raises:
        FileNotFoundError, ValueError: an unreadable or already quantised source, weights that are not finite,
            importance without calibration text or tokenizer.
        OSError: the target cannot be written; nothing is left half-written.
    """
    checkpoint = read_checkpoint(locate(source))
    if checkpoint.quantization is not None:
        raise ValueError(f"'{source}' is quantised already; quantise the original checkpoint")
    if checkpoint.model_type not in MODEL_TYPES:
        raise ValueError(f"only xLSTM models can be quantised, '{source}' holds a '{checkpoint.model_type}'")
    if checkpoint.model_type == "xlstm_large":
        config = dataclasses.replace(checkpoint.config, weight_mode="single")
        checkpoint = dataclasses.replace(checkpoint, config=config)
    moments: Mapping[str, Tensor] = {}
    if quantization.method == "importance":
        moments = _moments(checkpoint, quantization, calibration)
    weights = _quantized_weights(checkpoint, quantization, moments, on_matrix)
    other = None if dtype is None else resolve_dtype(dtype)
    weights = {n: t if n.endswith(".scales") else t.to(other) for n, t in weights.items()}
    result = dataclasses.replace(checkpoint, weights=weights, quantization=quantization)
    write_checkpoint(result, Path(target), layout="openxlstm", max_shard_bytes=max_shard_bytes)


def _quantized_weights(
    checkpoint: Checkpoint,
    quantization: Quantization,
    moments: Mapping[str, Tensor],
    on_matrix: Callable[[int, int], Any] | None,
) -> Weights:
    """The tensors of the quantised model; a matrix is quantised when the first of its two is read."""
    model = checkpoint.build_empty()
    found = quantizable(model, quantization)
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear map to quantise")
    made: dict[str, Tensor] = {}  # the half of a matrix that is yet to be written
    done = 0

    def half(name: str, bits: int, part: str) -> Tensor:
        nonlocal done
        if f"{name}.{part}" not in made:
            weight = stored[f"{name}.weight"].load()
            packed = quantize(
                weight,
                bits,
                group=quantization.group,
                method=quantization.method,
                importance=moments.get(name),
                name=f"'{name}.weight'",
            )
            made[f"{name}.weight"], made[f"{name}.scales"] = packed
            done += 1
            if on_matrix is not None:
                on_matrix(done, len(found))
        return made.pop(f"{name}.{part}")

    stored = dict(checkpoint.weights)
    for name in found:  # a tied head is stored under the embedding's name
        if f"{name}.weight" not in stored:
            stored[f"{name}.weight"] = stored[_tied_to(model, f"{name}.weight")]
    weights: Weights = {}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in found or leaf != "weight":
            weights[name] = tensor
            continue
        linear, bits = found[owner]
        empty = empty_quantized(linear, bits, quantization)
        for part, shape in (("weight", empty.weight), ("scales", empty.scales)):
            weights[f"{owner}.{part}"] = LazyTensor(
                tuple(shape.shape),
                shape.dtype,
                lambda owner=owner, bits=bits, part=part: half(owner, bits, part),
            )
    return weights


def _tied_to(model: nn.Module, alias: str) -> str:
    parameter = model.get_parameter(alias)
    return next(name for name, other in model.named_parameters() if other is parameter)


def _moments(
    checkpoint: Checkpoint, quantization: Quantization, calibration: Iterable[str]
) -> dict[str, Tensor]:
    """Mean squares of the inputs of every quantised map while the model reads the calibration text."""
    tokenizer = checkpoint.tokenizer
    if checkpoint.model_type == "xlstm_block_stack" or tokenizer is None:
        raise ValueError("method 'importance' needs a language model with a tokenizer; choose 'error-aware'")
    tokens: list[int] = []
    for text in calibration:
        tokens += tokenizer.encode(text)
        if len(tokens) >= CALIBRATION_TOKENS:
            break
    if len(tokens) < 2:
        raise ValueError("method 'importance' needs calibration text; there was none")
    model = build(checkpoint)
    return input_moments(model, quantization, torch.tensor(tokens[:CALIBRATION_TOKENS]))


@torch.inference_mode()
def input_moments(model: nn.Module, quantization: Quantization, tokens: Tensor) -> dict[str, Tensor]:
    """E[x_c^2] of the inputs of every map that ``quantization`` would replace, by name.

    Args:
        model: a language model.
        quantization: which maps.
        tokens: (N), read in rows of 1,024.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return see

    found = quantizable(model, quantization)
    hooks = [module.register_forward_pre_hook(watch(name)) for name, (module, _) in found.items()]
    try:
        for row in tokens.split(CALIBRATION_LENGTH):
            model(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(tokens) for name, total in sums.items()}
