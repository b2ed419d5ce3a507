"""Loading and saving models: :func:`load_pretrained`, :func:`save_pretrained`, and :func:`convert`.

A model is built on the meta device and given the tensors of the file, so nothing is initialised in vain and
no moment holds two copies: tensors that are used as stored are views of the memory-mapped file (read when
first used, private when written to), others are converted one by one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from openxlstm.checkpoint import huggingface, layouts
from openxlstm.checkpoint.hub import locate, published_tokenizer
from openxlstm.checkpoint.reading import (
    CHECKPOINT_TYPES,
    Checkpoint,
    quantization_fields,
    read_checkpoint,
    tied_names,
)
from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.checkpoint.weights import LazyTensor, Weights
from openxlstm.checkpoint.writing import DEFAULT_SHARD_BYTES, plan_shards, write_directory
from openxlstm.config import config_to_dict, nearest_name
from openxlstm.layers.quantized import quantize_model
from openxlstm.runtime import resolve_device, resolve_dtype

Layout = Literal["huggingface", "reference", "openxlstm"]
LAYOUTS: tuple[Layout, ...] = ("huggingface", "reference", "openxlstm")
"""Kinds of checkpoint directory that can be written."""


def load_pretrained(
    path_or_hub_id: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, Tokenizer | None]:
    """Load any xLSTM checkpoint.

    Args:
        path_or_hub_id: a directory or weight file (Hugging Face, reference package, or saved here; see
            :mod:`openxlstm.checkpoint.reading`), or ``owner/name[/folder][@revision]`` on the Hugging Face
            hub.
        dtype: floating point type of the parameters; None keeps what is stored.
        device: where the model goes; ``"auto"`` takes an accelerator if there is one.

    Returns:
        the model, in evaluation mode, and its tokenizer (None if the checkpoint has none). The tokenizer
        prepends the beginning-of-sequence token that the published models need.

    Raises:
        FileNotFoundError: no such checkpoint, or parts of it are missing.
        ValueError: damaged or foreign files, or tensors that do not fit the configuration.
    """
    dtype = None if dtype is None else resolve_dtype(dtype)
    device = resolve_device(device)
    checkpoint = read_checkpoint(locate(path_or_hub_id))
    tokenizer = checkpoint.tokenizer
    if tokenizer is None and (directory := published_tokenizer(str(path_or_hub_id))):
        tokenizer = Tokenizer.load(directory)
        tokenizer.add_bos = True
    return build(checkpoint.to(dtype), device), tokenizer


def build(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Any:
    """The model of a checkpoint, in evaluation mode."""
    with torch.device("meta"):
        model = CHECKPOINT_TYPES[checkpoint.model_type][1](checkpoint.config)
    if checkpoint.quantization is not None:
        quantize_model(model, checkpoint.quantization, weights=False)
    aliases = tied_names(model)
    weights = checkpoint.weights
    if getattr(checkpoint.config, "weight_mode", "single") == "fused":
        weights = layouts.fuse(weights)
    tensors = {name: lazy.load().to(device) for name, lazy in weights.items()}
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    model.load_state_dict(tensors, assign=True)
    for alias, name in aliases.items():
        module, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(name))
    return model.eval()


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> None:
    """Save a model, whole or not at all.

    Args:
        model: an ``xLSTMLarge``, ``xLSTMLMModel``, ``TransformerLM`` or ``xLSTMBlockStack``.
        directory: target, made if missing. An older checkpoint there is replaced, other files stay.
        tokenizer: saved beside the model.
        layout: ``"huggingface"`` (``transformers`` loads it; only ``xLSTMLarge``), ``"reference"`` (that of
            the published package) or ``"openxlstm"``. None is the first where it can represent the model;
            an ``xLSTMLarge`` where it cannot is saved as ``"openxlstm"``, with a warning that says why.
        max_shard_bytes: size at which the weights are cut into several files.

    Raises:
        ValueError: a model of another kind, or one that ``layout`` cannot represent.
        OSError: the disk is full or not writable; nothing is left half-written.
    """
    checkpoint = checkpoint_of(model, tokenizer)
    if layout is None:
        layout = "openxlstm"
        if checkpoint.model_type == "xlstm_large" and checkpoint.quantization is None:
            reason = huggingface.obstacle(checkpoint.config, checkpoint.weights)
            if reason is None:
                layout = "huggingface"
            else:
                warnings.warn(f"saved in openxlstm's own layout: {reason}", stacklevel=2)
    write_checkpoint(checkpoint, Path(directory), layout=layout, max_shard_bytes=max_shard_bytes)


def checkpoint_of(model: nn.Module, tokenizer: Tokenizer | None = None) -> Checkpoint:
    """Describe a model in memory as a checkpoint; the tensors are not copied.

    Raises:
        ValueError: not one of the models that checkpoints hold.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    types = {cls: name for name, (_, cls) in CHECKPOINT_TYPES.items()}
    if type(model) not in types:
        known = ", ".join(cls.__name__ for cls in types)
        raise ValueError(f"cannot save a {type(model).__name__} as a checkpoint; known models: {known}")
    aliases = tied_names(model)
    weights = {n: LazyTensor.of(t) for n, t in model.state_dict().items() if n not in aliases}
    quantization = getattr(model, "quantization", None)
    return Checkpoint(types[type(model)], model.config, layouts.split_fused(weights), tokenizer, quantization)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Layout,
    weight_mode: Literal["single", "fused"] = "single",
    dtype: torch.dtype | str | None = None,
    slstm_layout: Literal["vanilla", "cuda"] = "vanilla",
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> None:
    """Convert a checkpoint into another layout, tensor by tensor. The numbers stay the same, bit for bit.

    Args:
        source: anything that :func:`load_pretrained` reads.
        target: directory to write.
        to: ``"huggingface"``, ``"reference"`` or ``"openxlstm"``.
        weight_mode: ``"fused"`` joins the linear maps of an xLSTMLarge that share an input (reference only).
        dtype: floating point type to convert to; None keeps what is stored.
        slstm_layout: layout of sLSTM cells, that of the published ``backend="vanilla"`` or ``"cuda"``
            (reference only).
        max_shard_bytes: size at which the weights are cut into several files.

    Raises:
        FileNotFoundError, ValueError: an unreadable source, or one that ``to`` cannot represent.
        OSError: the target cannot be written; nothing is left half-written.
    """
    checkpoint = read_checkpoint(locate(source)).to(None if dtype is None else resolve_dtype(dtype))
    write_checkpoint(
        checkpoint,
        Path(target),
        layout=to,
        weight_mode=weight_mode,
        slstm_layout=slstm_layout,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    layout: Layout,
    weight_mode: str = "single",
    slstm_layout: str = "vanilla",
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint directory; arguments and errors as for :func:`convert`."""
    for name, value, choices in (
        ("layout", layout, LAYOUTS),
        ("weight_mode", weight_mode, ("single", "fused")),
        ("slstm_layout", slstm_layout, ("vanilla", "cuda")),
    ):
        if value not in choices:
            hint = nearest_name(str(value), choices)
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")
    if layout != "reference" and (weight_mode, slstm_layout) != ("single", "vanilla"):
        raise ValueError("fused weights and the cuda sLSTM layout exist only in the reference layout")
    if layout != "openxlstm" and checkpoint.quantization is not None:
        raise ValueError(f"quantised models exist only in the openxlstm layout, not in '{layout}'")
    is_large = checkpoint.model_type == "xlstm_large"
    if layout == "huggingface" and not is_large:
        raise ValueError(
            f"the huggingface layout holds xLSTMLarge models only, this is an '{checkpoint.model_type}'; "
            "choose reference or openxlstm"
        )
    if layout == "reference" and checkpoint.model_type == "transformer_lm":
        raise ValueError("the reference package has no Transformer; choose the openxlstm layout")
    weights = _with_aliases(checkpoint)
    if weight_mode == "fused":
        weights = layouts.fuse(weights)
    if not is_large:
        weights = layouts.slstm_to(weights, slstm_layout)
    config = checkpoint.config
    texts: dict[str, str] = {} if checkpoint.tokenizer is None else checkpoint.tokenizer.files()
    if layout == "huggingface":
        reason = huggingface.obstacle(config, weights)
        if reason is not None:
            raise ValueError(f"cannot write the huggingface layout: {reason}; choose reference or openxlstm")
        weights = layouts.large_to_hf({n: t for n, t in weights.items() if n != "backbone.out_norm.bias"})
        files = huggingface.config_files(config, checkpoint.dtype, checkpoint.tokenizer)
        texts |= {name: _json(values) for name, values in files.items()}
    elif layout == "openxlstm":
        fields = {"model_type": checkpoint.model_type, **config_to_dict(config)}
        if checkpoint.quantization is not None:
            fields["quantization"] = quantization_fields(checkpoint.quantization)
        texts["config.json"] = _json(fields)
    else:
        texts["config.yaml"] = _yaml(_reference_fields(checkpoint, weight_mode, slstm_layout))
    shards, index = plan_shards(weights, max_shard_bytes, layout)
    if index is not None:
        texts["model.safetensors.index.json"] = index
    write_directory(directory, texts, shards)


def _with_aliases(checkpoint: Checkpoint) -> Weights:
    """All tensors that the files of other programs name, tied ones under both names."""
    weights = dict(checkpoint.weights)
    for alias, name in tied_names(checkpoint.build_empty()).items():
        weights[alias] = weights[name]
    return weights


def _reference_fields(checkpoint: Checkpoint, weight_mode: str, slstm_layout: str) -> dict[str, Any]:
    """The configuration with the fields of the reference package only."""
    values = config_to_dict(checkpoint.config)
    if checkpoint.model_type == "xlstm_large":
        for name in ("ffn_dim", "tie_word_embeddings", "ops_backend"):
            del values[name]
        values |= huggingface.feedforward_fields(checkpoint.config)
        # their code fails in its default mode unless it returns states
        return values | {"weight_mode": weight_mode, "return_last_states": True}
    config = checkpoint.config
    values |= {"slstm_at": config.slstm_positions, "mlstm_block": None, "slstm_block": None}
    if "m" in config.block_map:
        values["mlstm_block"] = config_to_dict(config.mlstm_block_config)
        del values["mlstm_block"]["mlstm"]["ops_backend"]
    if "s" in config.block_map:
        values["slstm_block"] = config_to_dict(config.slstm_block_config)
        del values["slstm_block"]["slstm"]["ops_backend"]
        values["slstm_block"]["slstm"]["backend"] = slstm_layout
    return values


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False)
