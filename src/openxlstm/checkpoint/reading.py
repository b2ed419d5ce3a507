"""Reading any published checkpoint into one description: :class:`Checkpoint`.

Formats, told apart by ``config.json`` / ``config.yaml`` and by the names of the tensors:

- Hugging Face directories of xLSTM-7b and the scaling-law models, old and new configuration keys;
- directories of the reference package's xLSTMLarge, single and fused weights;
- block stacks and language models on them, directories or bare state dicts, both sLSTM layouts;
- what :func:`openxlstm.save_pretrained` and :func:`openxlstm.checkpoint.quantize_checkpoint` write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openxlstm.checkpoint import huggingface, layouts
from openxlstm.checkpoint.architectures import large_config, stack_config
from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.checkpoint.weights import Weights, open_weights
from openxlstm.config import config_from_dict, config_to_dict, read_mapping
from openxlstm.layers.quantized import Quantization, quantize_model
from openxlstm.models import MODEL_TYPES, xLSTMBlockStack, xLSTMBlockStackConfig

CHECKPOINT_TYPES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    **MODEL_TYPES,
    "xlstm_block_stack": (xLSTMBlockStackConfig, xLSTMBlockStack),
}
"""Model types that a checkpoint may hold: the language models, and the stack without embedding and head."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before it becomes a model or another checkpoint. Nothing large has been read yet."""

    model_type: str
    """A name in :data:`CHECKPOINT_TYPES`."""
    config: Any
    """Configuration of the model, an instance of the type's configuration class."""
    weights: Weights
    """Tensors in canonical form; see :mod:`openxlstm.checkpoint.layouts`. Tied tensors appear once."""
    tokenizer: Tokenizer | None = None
    quantization: Quantization | None = None
    """How linear maps are quantised; None if they are not."""

    def to(self, dtype: torch.dtype | None) -> Checkpoint:
        """The same with floating point tensors in ``dtype``; scales of quantised maps keep their type."""

        def keeps(name: str) -> bool:
            return self.quantization is not None and name.endswith(".scales")

        return replace(self, weights={n: t if keeps(n) else t.to(dtype) for n, t in self.weights.items()})

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the numbers."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.weights.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def build_empty(self) -> nn.Module:
        """The model on the meta device, in canonical form: shapes without memory."""
        config = self.config
        if self.model_type == "xlstm_large":
            config = replace(config, weight_mode="single")
        with torch.device("meta"):
            model = CHECKPOINT_TYPES[self.model_type][1](config)
        return model if self.quantization is None else quantize_model(model, self.quantization, weights=False)


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check that its tensors are those of its model.

    Raises:
        FileNotFoundError: nothing there, or files are missing.
        ValueError: damaged or foreign files, or tensors that do not fit the configuration.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    directory = path if path.is_dir() else path.parent
    declared = _read_config(directory)
    quantization = _read_quantization(declared.pop("quantization", None), path)
    model_type = declared.get("model_type")
    if model_type is not None and model_type not in (*CHECKPOINT_TYPES, huggingface.MODEL_TYPE):
        raise ValueError(f"'{path}' holds a model of type '{model_type}', which is not an xLSTM")
    weights = layouts.strip_wrappers(open_weights(path))
    where = f"'{path}'"
    kind = "transformer" if model_type == "transformer_lm" else _kind(weights, where)
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None

    if kind == "large":
        weights = layouts.large_from_hf(layouts.split_fused(weights))
    elif kind == "stack":
        weights = layouts.slstm_to(weights, "vanilla")
    if model_type in CHECKPOINT_TYPES:
        fields = {name: value for name, value in declared.items() if name != "model_type"}
        config = config_from_dict(CHECKPOINT_TYPES[model_type][0], fields)
    elif kind == "large":
        if model_type == huggingface.MODEL_TYPE:
            weights = huggingface.complete(weights)
        declared = huggingface.declared_fields(declared)
        config = large_config(weights, declared, where)
        model_type = "xlstm_large"
        if tokenizer is not None:  # these models need the token, whatever the tokenizer's own files say
            forced = declared.get("force_bos_token_insert") is not False
            tokenizer.add_bos = forced and tokenizer.bos is not None
    else:
        config = stack_config(weights, declared, where)
        model_type = "xlstm_lm" if "token_embedding.weight" in weights else "xlstm_block_stack"
    checkpoint = Checkpoint(model_type, config, weights, tokenizer, quantization)
    return replace(checkpoint, weights=_fit(checkpoint, where))


def _read_config(directory: Path) -> dict[str, Any]:
    """Content of the configuration file, or nothing if there is none."""
    for name in ("config.json", "config.yaml"):
        if (directory / name).is_file():
            values = read_mapping(directory / name)
            nested = values.get("model")  # experiment files of the reference package
            return dict(nested) if isinstance(nested, Mapping) and "model_type" not in values else values
    return {}


QUANTIZATION_FORMAT = 1
"""Number of the layout of quantised checkpoints, in case there is ever another."""


def quantization_fields(quantization: Quantization) -> dict[str, Any]:
    """The section of ``config.json`` that :func:`read_checkpoint` understands."""
    return {"format": QUANTIZATION_FORMAT, **config_to_dict(quantization)}


def _read_quantization(section: Any, path: Path) -> Quantization | None:
    if section is None:
        return None
    fields = dict(section) if isinstance(section, Mapping) else {"format": section}
    number = fields.pop("format", None)
    if number != QUANTIZATION_FORMAT:
        raise ValueError(
            f"'{path}' is quantised in format {number!r}, this version reads format {QUANTIZATION_FORMAT}; "
            "quantise the original checkpoint again, or update openxlstm"
        )
    try:
        return config_from_dict(Quantization, fields, where="quantization.")
    except ValueError as error:
        raise ValueError(f"'{path}' is quantised in a way this version does not know: {error}") from None


def _kind(weights: Weights, where: str) -> str:
    if any(name.startswith("backbone.blocks.") for name in weights):
        return "large"
    if any(re.match(r"(xlstm_block_stack\.)?blocks\.\d+\.xlstm\.", name) for name in weights):
        return "stack"
    example = next(iter(weights), None)
    found = "it has no tensors" if example is None else f"its tensors have names like '{example}'"
    raise ValueError(f"{where} does not hold an xLSTM: {found}")


def _fit(checkpoint: Checkpoint, where: str) -> Weights:
    """The tensors of the checkpoint in the order of the model, after checking that they are its own."""
    model = checkpoint.build_empty()
    expected = model.state_dict()
    aliases = tied_names(model)
    weights = checkpoint.weights
    missing = [n for n in expected if n not in weights and aliases.get(n, n) not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{where} lacks tensor '{missing[0]}'{more}")
    unknown = [n for n in weights if n not in expected]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"{where} holds tensor '{unknown[0]}'{more}, which {type(model).__name__} does not have"
        )
    for name, tensor in expected.items():
        if name in weights and weights[name].shape != tuple(tensor.shape):
            raise ValueError(
                f"tensor '{name}' in {where} has shape {weights[name].shape}, expected {tuple(tensor.shape)}"
            )
        if name in weights and checkpoint.quantization is not None:
            _check_packed_type(name, weights[name].dtype, tensor.dtype, where)
    return {name: weights[name] for name in expected if name not in aliases}


def _check_packed_type(name: str, found: torch.dtype, expected: torch.dtype, where: str) -> None:
    packed = not expected.is_floating_point or name.endswith(".scales")
    if packed != (not found.is_floating_point or name.endswith(".scales")) or (packed and found != expected):
        raise ValueError(
            f"tensor '{name}' in {where} has type {str(found).removeprefix('torch.')}, expected "
            f"{str(expected).removeprefix('torch.')}: was it quantised in another way?"
        )


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that share a tensor with an earlier one, and the name of that one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        earlier = first.setdefault(id(parameter), name)
        if earlier != name:
            aliases[name] = earlier
    return aliases
