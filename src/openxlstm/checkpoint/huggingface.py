"""Hugging Face directories of xLSTMLarge: configuration in both directions.

``transformers`` knows the architecture as model type "xlstm". Its configuration differs from the published
``xLSTMLargeConfig`` in names (``hidden_size``, ``num_hidden_layers``; older files, those of the published
weights, say ``embedding_dim``, ``num_blocks``) and in a few habits that are met here:

- The feed-forward width is recomputed from ``ffn_proj_factor`` and ``ffn_round_up_to_multiple_of``, so a pair
  is written that gives exactly the width of the tensors.
- Cache widths are rounded up to multiples of 64 but layer widths are not. Where that would crash, the files
  say ``use_cache: false`` (generation there is then correct but recomputes the prompt).
- A soft cap cannot be absent; 2^24 has the same effect in every floating point type.
- ``eos_token_id`` is 2 in the published files although sequences end with ``<|endoftext|>``, id 0. What is
  written here says 0.

Not representable: no norm after the last block, or a bias in it (:func:`obstacle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from openxlstm.checkpoint.architectures import exact_factor
from openxlstm.checkpoint.tokenizer import Tokenizer
from openxlstm.checkpoint.weights import LazyTensor, Weights
from openxlstm.models import xLSTMLargeConfig

MODEL_TYPE = "xlstm"
NO_CAP = 2.0**24
"""A soft cap so large that c tanh(u / c) is u in floating point."""
_OUT_BIAS = "backbone.out_norm.bias"
_RENAMED = {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}
_SAME = (
    "vocab_size",
    "num_heads",
    "use_bias",
    "norm_eps",
    "norm_reduction_force_float32",
    "add_out_norm",
    "qk_dim_factor",
    "v_dim_factor",
    "chunk_size",
    "autocast_kernel_dtype",
    "eps",
    "inference_state_dtype",
    "tie_word_embeddings",
)


def declared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Hugging Face ``config.json`` under the names of ``xLSTMLargeConfig``."""
    declared = dict(config)
    for theirs, ours in _RENAMED.items():
        value = declared.pop(theirs, None)
        if declared.get(ours) is None and value is not None:
            declared[ours] = value
    for cap in ("gate_soft_cap", "output_logit_soft_cap"):
        value = declared.get(cap)
        if isinstance(value, (int, float)) and value >= NO_CAP:
            declared[cap] = None
    return declared


def complete(weights: Weights) -> Weights:
    """Add the norm bias that their models leave out, as zeros, where all other biases are there."""
    weight = weights.get("backbone.out_norm.weight")
    biased = "backbone.blocks.0.mlstm_layer.out_proj.bias" in weights
    if not biased or weight is None or _OUT_BIAS in weights:
        return weights
    shape, dtype = weight.shape, weight.dtype
    return {**weights, _OUT_BIAS: LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))}


def obstacle(config: xLSTMLargeConfig, weights: Weights) -> str | None:
    """Why ``transformers`` cannot represent this model, or None if it can."""
    if not config.add_out_norm:
        return "transformers always has a norm after the last block, this model has none"
    if _OUT_BIAS in weights and bool(weights[_OUT_BIAS].load().any()):
        return "transformers has no bias in the last norm, this model (use_bias=True) has learned one"
    return None


def feedforward_fields(config: xLSTMLargeConfig) -> dict[str, Any]:
    """Factor and multiple with which the published PyTorch formula gives this model's feed-forward width."""
    width, hidden = config.embedding_dim, config.ffn_hidden_dim
    factor, multiple = config.ffn_proj_factor, config.ffn_round_up_to_multiple_of
    if int((width * factor + multiple - 1) // multiple) * multiple != hidden:
        factor, multiple = exact_factor(width, hidden), 64 if hidden % 64 == 0 else 1
    return {"ffn_proj_factor": float(factor), "ffn_round_up_to_multiple_of": multiple}


def config_files(
    config: xLSTMLargeConfig, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    """Content of ``config.json`` and ``generation_config.json``."""
    bos = eos = 0
    pad = 1
    if tokenizer is not None:
        eos = tokenizer.eos_id if tokenizer.eos_id is not None else 0
        bos = tokenizer.bos_id if tokenizer.bos_id is not None else eos
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else eos
    special: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    if config.qk_dim % 64 or config.v_dim % 64:
        special["use_cache"] = False
    values: dict[str, Any] = {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": config.embedding_dim,
        "embedding_dim": config.embedding_dim,
        "num_hidden_layers": config.num_blocks,
        "num_blocks": config.num_blocks,
    }
    values |= {name: getattr(config, name) for name in _SAME}
    values |= feedforward_fields(config)
    values |= {
        "gate_soft_cap": float(config.gate_soft_cap or NO_CAP),
        "output_logit_soft_cap": float(config.output_logit_soft_cap or NO_CAP),
        "weight_mode": "single",
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": "inference",
        "return_last_states": True,
        "force_bos_token_insert": tokenizer is None or tokenizer.add_bos,
    }
    values |= special
    if "use_cache" in special:
        values["max_inference_chunksize"] = 2**31 - 1  # their chunked path needs the cache
    return {"config.json": values, "generation_config.json": special}
