"""Quantised weight matrices: what the numbers mean, how they are packed, how scales are chosen.

    int8:  value[r, c] = code[r, c] * scale[r]                    code in -127 .. 127, scale float32
    int4:  value[r, c] = (nibble[r, c] - 8) * scale[r, c // group]    nibble in 0 .. 15, scale bfloat16

A packed matrix is two tensors, the form that checkpoints store and kernels read:

====  ================================================  ==============================
bits  codes                                             scales
====  ================================================  ==============================
8     int8 (rows, columns)                              float32 (rows)
4     uint8 (rows, padded / 2), 16 bytes per 32 inputs  bfloat16 (rows, padded / group)
====  ================================================  ==============================

Byte j of an int4 block of 32 inputs holds input j in its low half and input j + 16 in its high half.
``padded`` is ``columns`` rounded up to a whole group; the padding holds the code of zero, so any width can be
quantised.

Scales are chosen to reach the largest number ("plain"), or to make the squared error smallest, where errors
count alike ("error-aware") or as much as the inputs they meet ("importance": weighted by the second moments
E[x_c^2] of the inputs). The search tries a few fractions of the plain scale, both signs for int4, whose range
is not symmetric, and refits the best by least squares. Codes are always those of the stored, rounded scale.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from openxlstm.config import nearest_name

Method = Literal["plain", "error-aware", "importance"]
METHODS: tuple[Method, ...] = get_args(Method)
GROUPS = (32, 64)
"""Numbers of inputs that may share an int4 scale."""
BLOCK = 32  # inputs that an int4 block packs
_SEARCH_BYTES = 1 << 24  # rows are searched in pieces of about this size


class Packed(NamedTuple):
    """A quantised matrix in the packed form of this module."""

    codes: Tensor
    scales: Tensor


def limit_of(activation_bits: int) -> int:
    """Largest integer that stands for an activation.

    Raises:
        ValueError: neither 16 nor 8 bits.
    """
    if activation_bits not in (16, 8):
        raise ValueError(f"activation_bits must be 16 or 8, got {activation_bits}")
    return 2 ** (activation_bits - 1) - 1


def check_scheme(bits: int, group: int, method: str = "plain") -> None:
    """Refuse what no kernel can read.

    Raises:
        ValueError: bits other than 8 and 4, a group other than 32 and 64, an unknown method.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if group not in GROUPS:
        raise ValueError(f"group must be 32 or 64 inputs per scale, got {group}")
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}.{nearest_name(method, METHODS)}"
        )


def quantize(
    weight: Tensor,
    bits: int,
    *,
    group: int = 32,
    method: Method = "error-aware",
    importance: Tensor | None = None,
    name: str = "the weight",
) -> Packed:
    """Quantise a matrix.

    Args:
        weight: (rows, columns), any floating dtype; rows are outputs.
        bits: 8 (a scale per row) or 4 (a scale per ``group`` inputs of a row).
        group: 32 or 64; only for 4 bits.
        method: how scales are chosen, see the module.
        importance: (columns), second moments of the inputs; for ``method="importance"``.
        name: what messages call the matrix.

    Returns:
        codes and scales, see the module.

    Raises:
        ValueError: not a matrix, NaN or infinite numbers, numbers too large for the scale's type, a missing
            or misshapen ``importance``, an unknown scheme.
    """
    check_scheme(bits, group, method)
    if weight.ndim != 2 or not weight.shape[1] or not weight.is_floating_point():
        raise ValueError(
            f"{name} must be a floating point matrix with at least one column, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds NaN or infinite numbers and cannot be quantised")
    rows, columns = weight.shape
    width = columns if bits == 8 else group * -(-columns // group)
    moments = None
    if method == "importance":
        moments = F.pad(_checked_moments(importance, columns, name), (0, width - columns))
        moments = moments.view(-1, width if bits == 8 else group)
    codes = weight.new_empty((rows, width), dtype=torch.int8)
    per_row = 1 if bits == 8 else width // group
    scales = weight.new_empty((rows, per_row), dtype=torch.float32 if bits == 8 else torch.bfloat16)
    step = max(1, _SEARCH_BYTES // (4 * max(width, 1)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        numbers = F.pad(weight[part].float(), (0, width - columns)).unflatten(1, (per_row, -1))
        found, scale = _choose(numbers, bits, scales.dtype, method != "plain", moments)
        codes[part], scales[part] = found.flatten(1), scale
    if not torch.isfinite(scales).all():
        raise ValueError(f"{name} holds numbers too large to be quantised")
    return Packed(codes, scales[:, 0]) if bits == 8 else Packed(pack_int4(codes), scales)


def _checked_moments(importance: Tensor | None, columns: int, name: str) -> Tensor:
    if importance is None:
        raise ValueError(f"method 'importance' needs the second moments of the inputs of {name}")
    if importance.shape != (columns,) or not bool(torch.isfinite(importance).all() & (importance >= 0).all()):
        raise ValueError(
            f"the second moments for {name} must be {columns} finite numbers, none negative, "
            f"got shape {tuple(importance.shape)}"
        )
    mean = importance.float().mean()
    # inputs that were never seen active still count a little: the text may have missed them
    return importance.float() / mean + 1e-3 if mean > 0 else torch.ones_like(importance, dtype=torch.float32)


def _choose(
    numbers: Tensor, bits: int, scale_dtype: torch.dtype, search: bool, moments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes (rows, groups, width) and scales (rows, groups) of numbers (rows, groups, width)."""
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    extreme = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = ((extreme.abs() if bits == 8 else -extreme) / -low).to(scale_dtype)
    codes = _round(numbers, scale, low, high)
    if not search:
        return codes.to(torch.int8), scale
    best = _error(numbers, codes, scale, moments)
    fractions = [0.9, 0.94, 0.97, 1.03] if bits == 8 else [0.8, 0.86, 0.92, 0.96, 1.04, 1.1]
    candidates = [f * s for f in fractions for s in ((1.0,) if bits == 8 else (1.0, -1.0))]
    if bits == 4:
        candidates += [-1.0, -8 / 7]
    base = scale.float()

    def consider(trial: Tensor) -> None:
        nonlocal codes, scale, best
        trial_codes = _round(numbers, trial, low, high)
        error = _error(numbers, trial_codes, trial, moments)
        better = error < best
        codes = torch.where(better[..., None], trial_codes, codes)
        scale, best = torch.where(better, trial, scale), torch.where(better, error, best)

    for factor in candidates:
        consider((base * factor).to(scale_dtype))
    for _ in range(2):  # least squares for the codes found, then codes for the scale found
        weighted = codes if moments is None else codes * moments
        refit = (weighted * numbers).sum(-1) / (weighted * codes).sum(-1).clamp_min(1e-30)
        consider(refit.to(scale_dtype))
    return codes.to(torch.int8), scale


def _round(numbers: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Nearest codes; 0 where the scale is 0."""
    scale = scale.float()[..., None]
    return (numbers / torch.where(scale == 0, 1.0, scale)).round_().clamp_(low, high)


def _error(numbers: Tensor, codes: Tensor, scale: Tensor, moments: Tensor | None) -> Tensor:
    squared = torch.addcmul(numbers, codes, scale.float()[..., None], value=-1).square_()
    return squared.sum(-1) if moments is None else (squared * moments).sum(-1)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes -8 .. 7 (rows, columns), columns a multiple of 32, to bytes (rows, columns / 2)."""
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The opposite of :func:`pack_int4`."""
    blocks = packed.unflatten(1, (-1, 1, BLOCK // 2))
    return torch.cat([blocks & 15, blocks >> 4], dim=2).flatten(1).to(torch.int8) - 8


def check_packed(codes: Tensor, scales: Tensor, columns: int) -> int:
    """The group of a packed matrix with ``columns`` inputs; 0 for int8.

    Raises:
        ValueError: tensors that are no packed matrix of that width.
    """
    rows = codes.shape[0] if codes.ndim == 2 else -1
    if codes.dtype == torch.int8 and codes.shape == (rows, columns):
        if scales.dtype == torch.float32 and scales.shape == (rows,):
            return 0
    elif codes.dtype == torch.uint8 and scales.dtype == torch.bfloat16:
        for group in GROUPS:
            padded = group * -(-columns // group)
            if codes.shape == (rows, padded // 2) and scales.shape == (rows, padded // group):
                return group
    raise ValueError(
        f"not a packed matrix of {columns} inputs: codes {codes.dtype} {tuple(codes.shape)}, "
        f"scales {scales.dtype} {tuple(scales.shape)}; see openxlstm.ops.quantization"
    )


def dequantize(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The numbers a packed matrix stands for.

    Args:
        codes, scales: packed form, see the module.
        columns: number of inputs.

    Returns:
        float32 (rows, columns); exact, for a code has at most 7 bits beside its sign.

    Raises:
        ValueError: tensors that are no packed matrix of that width.
    """
    group = check_packed(codes, scales, columns)
    if group == 0:
        return codes.float() * scales[:, None]
    values = unpack_int4(codes).float().unflatten(1, (-1, group)) * scales.float()[..., None]
    return values.flatten(1)[:, :columns]
