"""Names and layouts: what the same weights are called and how they are cut in each published format.

In memory there is one canonical form, that of the modules here: xLSTMLarge with the reference package's names
and single (not fused) weights, block stacks with the "vanilla" sLSTM layout. The functions of this module go
from a published form to the canonical one and back; all are exact permutations of the stored numbers.

=================  =============================  =====================================================
form               embedding                      linear maps
=================  =============================  =====================================================
reference single   ``embedding.weight``           q, k, v, ogate_preact, igate_preact, fgate_preact, ...
reference fused    ``embedding.weight``           qkv_opreact = [q|k|v|ogate], ifgate_preact = [i|f],
                                                  ffn.proj_up_gate_z = [gate|up], rows stacked
Hugging Face       ``backbone.embeddings.weight`` as either of the above
=================  =============================  =====================================================

sLSTM cells (gate order i, f, z, o; NH heads of width DH) have two layouts under the same names:

- vanilla: ``_recurrent_kernel_`` (NH, 4 DH, DH) [head, gate x out, in], ``_bias_`` [gate, head, channel];
- cuda: ``_recurrent_kernel_`` (NH, DH, 4 DH) [head, in, gate x out], ``_bias_`` [head, gate, channel].

The bias has the same shape in both, so only the recurrent matrix tells which layout a file has.
"""

from __future__ import annotations

import re

import torch

from openxlstm.checkpoint.weights import LazyTensor, Weights

HF_EMBEDDING, EMBEDDING, HEAD = "backbone.embeddings.weight", "embedding.weight", "lm_head.weight"
_WRAPPERS = ("module.", "_orig_mod.", "model.", "_forward_module.")
_FUSED = {  # fused name -> its parts, in order of rows
    "mlstm_layer.qkv_opreact": ("q", "k", "v", "ogate_preact"),
    "mlstm_layer.ifgate_preact": ("igate_preact", "fgate_preact"),
    "ffn.proj_up_gate_z": ("proj_up_gate", "proj_up"),
}
_RECURRENT, _BIAS = "slstm_cell._recurrent_kernel_", "slstm_cell._bias_"


def strip_wrappers(weights: Weights) -> Weights:
    """Drop the prefixes that DataParallel, torch.compile and training frameworks put before every name."""
    changed = True
    while changed and weights:
        changed = False
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in weights):
                weights = {name.removeprefix(prefix): t for name, t in weights.items()}
                changed = True
    return weights


# --------------------------------------------------------------------------- xLSTMLarge


def large_from_hf(weights: Weights) -> Weights:
    """Hugging Face names to reference names."""
    return {EMBEDDING if name == HF_EMBEDDING else name: t for name, t in weights.items()}


def large_to_hf(weights: Weights) -> Weights:
    """Reference names to Hugging Face names."""
    return {HF_EMBEDDING if name == EMBEDDING else name: t for name, t in weights.items()}


def split_fused(weights: Weights) -> Weights:
    """Cut fused linear maps into single ones; single ones pass unchanged."""
    result: Weights = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.)(.+)\.(weight|bias)", name)
        if match is None or match[2] not in _FUSED:
            result[name] = tensor
            continue
        block, fused, kind = match[1], match[2], match[3]
        folder, parts = fused.rsplit(".", 1)[0], _FUSED[fused]
        sizes = _part_sizes(weights, block, fused, name)
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            rows = slice(start, start + size)
            piece = tensor.map((size, *tensor.shape[1:]), lambda t, rows=rows: t[rows])
            result[f"{block}{folder}.{part}.{kind}"] = piece
            start += size
    return result


def _part_sizes(weights: Weights, block: str, fused: str, name: str) -> list[int]:
    rows = weights[name].shape[0]
    if fused.endswith("qkv_opreact"):
        out = weights.get(f"{block}mlstm_layer.out_proj.weight")
        v = out.shape[1] if out is not None and len(out.shape) == 2 else 0
        qk = (rows - 2 * v) // 2
        sizes = [qk, qk, v, v]
    else:
        sizes = [rows // 2, rows // 2]
    if min(sizes) < 1 or sum(sizes) != rows:
        raise ValueError(f"fused tensor '{name}' has {rows} rows, which do not divide into its parts {sizes}")
    return sizes


def fuse(weights: Weights) -> Weights:
    """Join single linear maps into fused ones, the opposite of :func:`split_fused`."""
    result = dict(weights)
    blocks = {m[1]: None for name in weights if (m := re.match(r"(backbone\.blocks\.\d+\.)", name))}
    for block in blocks:
        for fused, parts in _FUSED.items():
            folder = fused.rsplit(".", 1)[0]
            for kind in ("weight", "bias"):
                names = [f"{block}{folder}.{part}.{kind}" for part in parts]
                if not all(name in result for name in names):
                    continue
                pieces = [result.pop(name) for name in names]
                rows = sum(piece.shape[0] for piece in pieces)
                result[f"{block}{fused}.{kind}"] = LazyTensor(
                    (rows, *pieces[0].shape[1:]),
                    pieces[0].dtype,
                    lambda pieces=pieces: torch.cat([piece.load() for piece in pieces]),
                )
    return result


# --------------------------------------------------------------------------- sLSTM cells


def slstm_layout(recurrent: LazyTensor, name: str) -> str:
    """``"vanilla"`` or ``"cuda"``, from the shape of the recurrent matrix.

    Raises:
        ValueError: the shape belongs to neither.
    """
    if len(recurrent.shape) == 3:
        _, rows, columns = recurrent.shape
        if rows == 4 * columns:
            return "vanilla"
        if columns == 4 * rows:
            return "cuda"
    raise ValueError(
        f"tensor '{name}' has shape {recurrent.shape}; an sLSTM recurrent matrix is "
        "(heads, 4 x width, width) or (heads, width, 4 x width)"
    )


def slstm_to(weights: Weights, layout: str) -> Weights:
    """Bring every sLSTM cell into ``layout``, whichever it has."""
    result = dict(weights)
    for name, recurrent in weights.items():
        if not name.endswith(_RECURRENT):
            continue
        if slstm_layout(recurrent, name) == layout:
            continue
        heads, a, b = recurrent.shape
        width = min(a, b)
        result[name] = recurrent.map((heads, b, a), lambda t: t.transpose(1, 2).contiguous())
        bias_name = name.removesuffix(_RECURRENT) + _BIAS
        bias = weights.get(bias_name)
        if bias is None:
            continue
        if bias.shape != (4 * heads * width,):
            raise ValueError(
                f"tensor '{bias_name}' has shape {bias.shape}, expected ({4 * heads * width},) "
                f"because '{name}' has shape {recurrent.shape}"
            )
        outer, inner = (heads, 4) if layout == "vanilla" else (4, heads)
        result[bias_name] = bias.map(
            bias.shape,
            lambda t, o=outer, i=inner, w=width: t.reshape(o, i, w).transpose(0, 1).reshape(-1),
        )
    return result
