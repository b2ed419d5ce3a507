"""Where everything is: the modules of a model as the native decode program sees them.

Matrices are used in place. Small things (norms, biases, convolutions, block-diagonal maps) are copied to
float32 in the order that the kernels read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openxlstm import layers
from openxlstm.layers.large import mLSTMLargeBlock
from openxlstm.layers.quantized import QuantizedLinear
from openxlstm.models import xLSTMBlockStack, xLSTMLarge, xLSTMLMModel
from openxlstm.models.large import xLSTMLargeBackbone
from openxlstm.ops import decode
from openxlstm.ops.decode import Map, Norm, Program
from openxlstm.ops.products import Weight, dense_weight, use_huge_pages
from openxlstm.ops.quantization.native import packed_weight
from openxlstm.state import LayerState, ModelState

_MODELS = (xLSTMLarge, xLSTMLMModel)
_KNOWN = {
    *_MODELS,
    xLSTMBlockStack,
    xLSTMLargeBackbone,
    *(value for value in vars(layers).values() if isinstance(value, type) and issubclass(value, nn.Module)),
    QuantizedLinear,
    nn.Embedding,
    nn.Conv1d,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
}
_BACKENDS = ("auto", "native")
_LARGE = 1 << 18
"""Bytes of a tensor whose pages matter."""


def why_not(model: nn.Module) -> str | None:
    """Why a decode program cannot be built from ``model``, or None if it can."""
    if type(model) not in _MODELS:
        return f"it runs xLSTMLarge and xLSTMLMModel, not {type(model).__name__}"
    for name, module in model.named_modules():
        if type(module) not in _KNOWN:
            return f"'{name}' is a {type(module).__name__}, which it does not know"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"'{name or type(model).__name__}' has forward hooks, which it would not call"
        if not vars(module).keys().isdisjoint(("forward", "step")):
            return f"'{name or type(model).__name__}' has a forward or step of its own"
        backend = getattr(module, "step_backend", "auto")
        if backend not in _BACKENDS:
            return f"the configuration asks for the backend '{backend}'"
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            return f"it runs on CPUs, and the model is on {tensor.device.type}"
    for name, tensor in model.named_parameters():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"weights must be float32 or bfloat16, '{name}' is {dtype}"
        if tensor.ndim > 1 and not tensor.is_contiguous():
            return f"'{name}' is not contiguous"
    return None


def build_program(model: nn.Module, state_dtype: torch.dtype) -> Program:
    """The program of a model that :func:`why_not` finds nothing against."""
    with torch.inference_mode(False), torch.no_grad():
        weights = [t.detach() for t in (*model.parameters(), *model.buffers())]
        for tensor in weights:
            if tensor.nbytes >= _LARGE:
                use_huge_pages(tensor)
        if isinstance(model, xLSTMLarge):
            blocks: Any = model.backbone.blocks
            layer_fields = [_large_block(block) for block in blocks]
            embedding, out_norm = model.embedding, model.backbone.out_norm
            cap = model.config.output_logit_soft_cap or 0.0
        elif isinstance(model, xLSTMLMModel):
            stack = model.xlstm_block_stack
            layer_fields = [_stack_block(block) for block in stack.blocks]
            embedding, out_norm, cap = model.token_embedding, stack.post_blocks_norm, 0.0
        else:
            raise ValueError(f"no decode program for a {type(model).__name__}")
        return Program(
            layer_fields,
            embedding=dense_weight(embedding.weight),
            out_norm=_norm(out_norm),
            head=_map(model.lm_head),
            logit_cap=cap,
            state_dtype=state_dtype,
            keep=weights,
        )


def state_arrays(states: ModelState) -> list[Mapping[str, Tensor]]:
    """The arrays of each block's state by the names the program has for them."""
    arrays: list[Mapping[str, Tensor]] = []
    for block in states.blocks:
        cell = block.cell if isinstance(block, LayerState) else block
        fields = dict(zip(cell._fields, cell, strict=True))
        if isinstance(block, LayerState):
            fields["conv_state"] = block.conv
        arrays.append(fields)
    return arrays


def _float(tensor: Tensor | None) -> Tensor | None:
    """float32 and contiguous, a copy only if it must be."""
    return None if tensor is None else tensor.detach().float().contiguous()


def _weight(module: Any, rows: slice) -> Weight:
    if isinstance(module, QuantizedLinear):
        return packed_weight(module.weight[rows], module.scales[rows], module.in_features)
    return dense_weight(module.weight.detach()[rows])


def _map(module: Any) -> Map:
    return Map(_weight(module, slice(None)), _float(module.bias))


def _rows(module: Any, counts: Sequence[int]) -> list[Map]:
    """One map for each stretch of rows of a fused matrix, in place."""
    maps, start = [], 0
    for count in counts:
        rows = slice(start, start + count)
        maps.append(Map(_weight(module, rows), None if module.bias is None else _float(module.bias[rows])))
        start += count
    return maps


def _norm(module: Any) -> Norm:
    if isinstance(module, nn.Identity):
        return Norm(decode.NONE)
    if isinstance(module, layers.LayerNorm | layers.MultiHeadLayerNorm):
        weight = None if module.weight is None else 1 + module.weight.detach().float()
        return Norm(decode.LAYER, weight, None, module.eps)
    kind = decode.RMS if isinstance(module, layers.RMSNorm) else decode.LAYER
    return Norm(kind, _float(module.weight), _float(module.bias), module.eps)


def _large_block(block: mLSTMLargeBlock) -> dict[str, Any]:
    layer, ffn, config = block.mlstm_layer, block.ffn, block.mlstm_layer.config
    heads, qk, v, hidden = config.num_heads, config.qk_dim, config.v_dim, config.ffn_hidden_dim
    if config.weight_mode == "fused":
        q, k, v_map, o = _rows(layer.qkv_opreact, (qk, qk, v, v))
        i, f = _rows(layer.ifgate_preact, (heads, heads))
        gate, up = _rows(ffn.proj_up_gate_z, (hidden, hidden))
    else:
        names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
        q, k, v_map, o, i, f = (_map(getattr(layer, name)) for name in names)
        gate, up = _map(ffn.proj_up_gate), _map(ffn.proj_up)
    return {
        "kind": decode.LARGE,
        "heads": heads,
        "dk": qk // heads,
        "dv": v // heads,
        "hidden": hidden,
        "activation": decode.ACTIVATIONS["swish"],
        "eps": config.eps,
        "gate_cap": config.gate_soft_cap or 0.0,
        "norm": _norm(block.norm_mlstm),
        "head_norm": _norm(layer.multihead_norm),
        "ffn_norm": _norm(block.norm_ffn),
        "q": q,
        "k": k,
        "v": v_map,
        "o": o,
        "i": i,
        "f": f,
        "out": _map(layer.out_proj),
        "ffn_gate": gate,
        "ffn_up": up,
        "ffn_down": _map(ffn.proj_down),
    }


def _stack_block(block: Any) -> dict[str, Any]:
    layer = block.xlstm
    fields = {"norm": _norm(block.xlstm_norm), **_convolution(layer.conv1d)}
    fields |= _mlstm_layer(layer) if isinstance(layer, layers.mLSTMLayer) else _slstm_layer(layer)
    if block.ffn is not None:
        config = block.ffn.config
        hidden = config.proj_up_dim
        gate, up = _rows(block.ffn.proj_up, (hidden, hidden))
        fields |= {"hidden": hidden, "activation": decode.ACTIVATIONS[config.act_fn]}
        fields |= {"ffn_norm": _norm(block.ffn_norm), "ffn_gate": gate, "ffn_up": up}
        fields["ffn_down"] = _map(block.ffn.proj_down)
    return fields


def _convolution(module: layers.CausalConv1d) -> dict[str, Any]:
    if module.conv is None:
        return {"taps": 0}
    weight = module.conv.weight.detach()[:, 0].T.float().contiguous()  # (K, E)
    return {"taps": module.kernel_size, "conv": weight, "conv_bias": _float(module.conv.bias)}


def _mlstm_layer(layer: layers.mLSTMLayer) -> dict[str, Any]:
    config, cell = layer.config, layer.mlstm_cell
    inner = config.inner_embedding_dim
    up, z = _rows(layer.proj_up, (inner, inner))
    diagonal = (layer.q_proj, layer.k_proj, layer.v_proj)
    return {
        "kind": decode.MLSTM_BLOCK,
        "heads": config.num_heads,
        "dk": inner // config.num_heads,
        "dv": inner // config.num_heads,
        "block": config.qkv_proj_blocksize,
        "eps": 1e-6,  # the operator's default
        "head_norm": _norm(cell.outnorm),
        "up": up,
        "z": z,
        "i": _map(cell.igate),
        "f": _map(cell.fgate),
        "out": _map(layer.proj_down),
        "skip": _float(layer.learnable_skip),
        "diagonal": tuple(_float(module.weight.mT) for module in diagonal),
        "diagonal_bias": tuple(_float(module.bias) for module in diagonal),
    }


def _slstm_layer(layer: layers.sLSTMLayer) -> dict[str, Any]:
    config, cell = layer.config, layer.slstm_cell
    dim = config.embedding_dim // config.num_heads
    norm = _norm(layer.group_norm)
    if norm.weight is None:
        norm = norm._replace(weight=torch.ones(config.embedding_dim))

    def headwise(module: layers.LinearHeadwise) -> Map:
        return Map(dense_weight(module.weight.detach().view(-1, dim)), _float(module.bias))

    recurrent = dense_weight(cell._recurrent_kernel_.detach().view(-1, dim))
    return {
        "kind": decode.SLSTM_BLOCK,
        "cell": decode.CELLS[config.function],
        "heads": config.num_heads,
        "dv": dim,
        "head_norm": norm,
        # the published names of the input and forget gates are swapped, see sLSTMLayer
        "i": headwise(layer.fgate),
        "f": headwise(layer.igate),
        "z": headwise(layer.zgate),
        "o": headwise(layer.ogate),
        "recurrent": Map(recurrent, _float(cell._bias_)),
    }
