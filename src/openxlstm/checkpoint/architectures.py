"""Configurations from tensor shapes: what a set of weights says about the model it belongs to.

A published configuration and the published weights need not agree on widths: three programs round the
feed-forward width in three ways. Shapes are therefore the truth for all widths, heads and optional tensors; a
configuration adds what shapes cannot tell (epsilons, soft caps, the activation) and must agree on the number
of blocks, the width of the model and the vocabulary, since a disagreement there means missing files.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from openxlstm.checkpoint.layouts import EMBEDDING, HEAD
from openxlstm.checkpoint.weights import Weights
from openxlstm.config import config_from_dict
from openxlstm.layers.blocks import mLSTMBlockConfig, sLSTMBlockConfig
from openxlstm.layers.feedforward import FeedForwardConfig, projected_dim
from openxlstm.layers.mlstm_layer import mLSTMLayerConfig
from openxlstm.layers.slstm_layer import sLSTMLayerConfig
from openxlstm.models import (
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)


def exact_factor(base: int, width: int) -> float:
    """A factor f with ``int(base * f) == width`` in floating point, as the published code computes widths."""
    factor = width / base
    while int(base * factor) < width:
        factor = math.nextafter(factor, math.inf)
    return factor


def _shape(weights: Weights, name: str, where: str, rank: int = 2) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"{where} lacks tensor '{name}'")
    shape = weights[name].shape
    if len(shape) != rank:
        raise ValueError(f"tensor '{name}' in {where} has shape {shape}, expected {rank} dimensions")
    return shape


def _count_blocks(weights: Weights, pattern: str, where: str) -> int:
    found = {int(m[1]) for name in weights if (m := re.match(pattern, name))}
    missing = set(range(max(found, default=-1) + 1)) - found
    if missing:
        raise ValueError(f"{where} is incomplete: block {min(missing)} of {max(found) + 1} has no tensors")
    return len(found)


def _check_declared(declared: Mapping[str, Any], found: Mapping[str, int], where: str) -> None:
    for name, value in found.items():
        if isinstance(declared.get(name), int) and declared[name] not in (value, -1):
            raise ValueError(
                f"{where} does not fit its configuration: {name} is {declared[name]} there, "
                f"but the weights have {value}"
            )


def _tied(weights: Weights, embedding: str, head: str, declared: bool | None) -> bool:
    """Whether the output matrix is the embedding. Two different stored matrices are never tied."""
    if head not in weights:
        return True
    if declared is False or weights[head].shape != weights[embedding].shape:
        return False
    return torch.equal(weights[head].load(), weights[embedding].load())


def large_config(weights: Weights, declared: Mapping[str, Any], where: str) -> xLSTMLargeConfig:
    """Configuration of an xLSTMLarge.

    Args:
        weights: in canonical form (reference names, single matrices).
        declared: fields that a configuration file gives, under the published names; others are ignored.
        where: what to call the checkpoint in messages.

    Raises:
        ValueError: weights of another architecture, or that contradict ``declared``.
    """
    vocab_size, width = _shape(weights, EMBEDDING, where)
    block = "backbone.blocks.0."
    found = {
        "embedding_dim": width,
        "num_heads": _shape(weights, f"{block}mlstm_layer.igate_preact.weight", where)[0],
        "num_blocks": _count_blocks(weights, r"backbone\.blocks\.(\d+)\.", where),
        "vocab_size": vocab_size,
    }
    _check_declared(declared, found, where)
    known = {f.name for f in dataclasses.fields(xLSTMLargeConfig)}
    values = {n: v for n, v in declared.items() if n in known and (v is not None or n.endswith("soft_cap"))}
    values |= found | {
        "use_bias": f"{block}mlstm_layer.out_proj.bias" in weights,
        "add_out_norm": "backbone.out_norm.weight" in weights,
        "weight_mode": "single",
        "return_last_states": False,  # callers ask with return_state
    }
    for name, tensor in (("qk_dim_factor", "q"), ("v_dim_factor", "v")):
        rows = _shape(weights, f"{block}mlstm_layer.{tensor}.weight", where)[0]
        default = getattr(xLSTMLargeConfig, name)
        declared_factor = values.get(name, default)
        fits = isinstance(declared_factor, (int, float)) and int(width * declared_factor) == rows
        values[name] = declared_factor if fits else exact_factor(width, rows)
    values.pop("ffn_dim", None)
    values["tie_word_embeddings"] = _tied(
        weights, EMBEDDING, HEAD, bool(declared.get("tie_word_embeddings", False))
    )
    config = config_from_dict(xLSTMLargeConfig, values, where="")
    hidden = _shape(weights, f"{block}ffn.proj_up.weight", where)[0]
    return config if config.ffn_hidden_dim == hidden else dataclasses.replace(config, ffn_dim=hidden)


def stack_config(
    weights: Weights, declared: Mapping[str, Any], where: str
) -> xLSTMBlockStackConfig | xLSTMLMModelConfig:
    """Configuration of a block stack, or of a language model on one if there is a ``token_embedding``.

    Arguments and errors as for :func:`large_config`.
    """
    is_model = "token_embedding.weight" in weights
    prefix = "xlstm_block_stack." if is_model else ""
    cls = xLSTMLMModelConfig if is_model else xLSTMBlockStackConfig
    count = _count_blocks(weights, re.escape(prefix) + r"blocks\.(\d+)\.", where)
    width = _shape(weights, f"{prefix}blocks.0.xlstm_norm.weight", where, rank=1)[0]
    found = {"embedding_dim": width, "num_blocks": count}
    if is_model:
        found["vocab_size"] = _shape(weights, "token_embedding.weight", where)[0]
    _check_declared(declared, found, where)
    declared = _without_gradient_switches({n: v for n, v in declared.items() if v is not None})
    config = config_from_dict(cls, {**declared, **found, "slstm_at": []}, ignore_unknown=True)

    kinds = ["s" if f"{prefix}blocks.{n}.xlstm.zgate.weight" in weights else "m" for n in range(count)]
    changes: dict[str, Any] = {
        "slstm_at": [n for n, kind in enumerate(kinds) if kind == "s"],
        "add_post_blocks_norm": f"{prefix}post_blocks_norm.weight" in weights,
        "mlstm_block": None,
        "slstm_block": None,
    }
    if "m" in kinds:
        block = f"{prefix}blocks.{kinds.index('m')}."
        changes["mlstm_block"] = _mlstm_block(weights, block, config.mlstm_block, width, where)
        changes["bias"] = f"{block}xlstm.proj_up.bias" in weights
    if "s" in kinds:
        block = f"{prefix}blocks.{kinds.index('s')}."
        changes["slstm_block"] = _slstm_block(weights, block, config.slstm_block, width, where)
    if is_model:
        tie = declared.get("tie_weights")
        changes["tie_weights"] = _tied(weights, "token_embedding.weight", HEAD, tie)
    return dataclasses.replace(config, **changes)


def _without_gradient_switches(declared: dict[str, Any]) -> dict[str, Any]:
    """Drop the published switches that only changed how the CUDA kernel approximated gradients."""
    block = declared.get("slstm_block")
    cell = block.get("slstm") if isinstance(block, Mapping) else None
    if isinstance(block, Mapping) and isinstance(cell, Mapping):
        switches = ("gradient_recurrent_cut", "gradient_recurrent_clipval")
        cell = {name: value for name, value in cell.items() if name not in switches}
        declared = {**declared, "slstm_block": {**block, "slstm": cell}}
    return declared


def _mlstm_block(
    weights: Weights, block: str, declared: mLSTMBlockConfig | None, width: int, where: str
) -> mLSTMBlockConfig:
    layer = declared.mlstm if declared else mLSTMLayerConfig()
    conv = f"{block}xlstm.conv1d.conv.weight"
    layer = dataclasses.replace(
        layer,
        num_heads=_shape(weights, f"{block}xlstm.mlstm_cell.igate.weight", where)[0],
        conv1d_kernel_size=weights[conv].shape[-1] if conv in weights else 0,
        qkv_proj_blocksize=_shape(weights, f"{block}xlstm.q_proj.weight", where, rank=3)[-1],
    )
    inner = _shape(weights, f"{block}xlstm.proj_down.weight", where)[1]
    if dataclasses.replace(layer, embedding_dim=width).inner_embedding_dim != inner:
        layer = dataclasses.replace(layer, **_exact_rounding(width, inner))
    return mLSTMBlockConfig(layer)


def _slstm_block(
    weights: Weights, block: str, declared: sLSTMBlockConfig | None, width: int, where: str
) -> sLSTMBlockConfig:
    layer = declared.slstm if declared else sLSTMLayerConfig()
    conv = f"{block}xlstm.conv1d.conv.weight"
    layer = dataclasses.replace(
        layer,
        num_heads=_shape(weights, f"{block}xlstm.zgate.weight", where, rank=3)[0],
        conv1d_kernel_size=weights[conv].shape[-1] if conv in weights else 0,
        group_norm_weight=f"{block}xlstm.group_norm.weight" in weights,
    )
    if f"{block}ffn.proj_up.weight" not in weights:
        return sLSTMBlockConfig(layer, None)
    feedforward = (declared and declared.feedforward) or FeedForwardConfig()
    feedforward = dataclasses.replace(feedforward, bias=f"{block}ffn.proj_up.bias" in weights)
    hidden = _shape(weights, f"{block}ffn.proj_up.weight", where)[0] // 2
    if dataclasses.replace(feedforward, embedding_dim=width).proj_up_dim != hidden:
        feedforward = dataclasses.replace(feedforward, **_exact_rounding(width, hidden))
    return sLSTMBlockConfig(layer, feedforward)


def _exact_rounding(width: int, inner: int) -> dict[str, Any]:
    """Fields of a block's configuration that give exactly the inner width ``inner``."""
    multiple = 64 if inner % 64 == 0 else 1
    factor = inner / width
    while projected_dim(width, factor, multiple) > inner:  # rounded up because of the last bit
        factor = math.nextafter(factor, 0.0)
    return {
        "proj_factor": factor,
        "round_proj_up_to_multiple_of": multiple,
        "round_proj_up_dim_up": True,
    }
