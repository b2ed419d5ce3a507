"""Linear maps with packed int8 or int4 weights, and putting them into a model.

Quantised are the large dense maps: projections, feed-forward and, unless told otherwise, the vocabulary head.
Everything a recurrence is sensitive to stays as it was: gates, norms, convolutions, recurrent and
block-diagonal matrices; so does the embedding, of which a token reads one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from openxlstm.layers.linear import Linear
from openxlstm.ops import quantized_linear
from openxlstm.ops.quantization import GROUPS, Method, check_scheme, dequantize, quantize

GATES = ("igate", "fgate", "igate_preact", "fgate_preact", "ifgate_preact")
HEAD = "lm_head"
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantised."""

    bits: int = 8
    """8 (a scale per output) or 4 (a scale per ``group`` inputs of an output)."""
    group: int = 32
    """Inputs that share an int4 scale: 32 or 64. Without effect on 8 bits."""
    method: Method = "error-aware"
    """How scales are chosen: "plain", "error-aware" or "importance"; see openxlstm.ops.quantization."""
    head_bits: Literal[4, 8, 16] | None = None
    """Bits of the vocabulary head; None: as ``bits``; 16: left as it is."""
    activation_bits: int = 16
    """Bits that activations are rounded to in sequences (prompts): 16, practically exact, or 8. Single steps
    always use 16."""

    def __post_init__(self) -> None:
        check_scheme(self.bits, self.group, self.method)
        if self.activation_bits not in (16, 8):
            raise ValueError(f"activation_bits must be 16 or 8, got {self.activation_bits}")
        if self.head_bits not in (None, 4, 8, 16):
            raise ValueError(f"head_bits must be 4, 8 or 16, got {self.head_bits}")

    def bits_of(self, name: str) -> int:
        """Bits of the linear map called ``name``; 16 if it is not quantised."""
        leaf = name.rpartition(".")[2]
        if leaf in GATES:
            return 16
        return self.head_bits if leaf == HEAD and self.head_bits is not None else self.bits


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with W packed, (..., in) -> (..., out).

    ``weight`` and ``scales`` are the packed form of :mod:`openxlstm.ops.quantization`. They move between
    devices with the module and keep their types whatever dtype the module is converted to.
    """

    weight: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        group: int,
        activation_bits: int = 16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.activation_bits = activation_bits
        self.group = group if bits == 4 else 0
        padded = group * -(-in_features // group)
        if bits == 8:
            codes = torch.zeros(out_features, in_features, dtype=torch.int8)
            scales = torch.zeros(out_features)
        else:
            codes = torch.full((out_features, padded // 2), 0x88, dtype=torch.uint8)
            scales = torch.zeros(out_features, padded // group, dtype=torch.bfloat16)
        self.register_buffer("weight", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        bits = 16 if x.ndim < 3 or x.shape[-2] == 1 else self.activation_bits
        return quantized_linear(x, self.weight, self.scales, self.bias, activation_bits=bits)

    def dequantized(self) -> Tensor:
        """The weights as numbers, float32 (out, in)."""
        return dequantize(self.weight, self.scales, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # scales belong to the codes: only the device may change
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{group}"


def quantizable(model: nn.Module, quantization: Quantization) -> dict[str, tuple[Linear, int]]:
    """Names of the linear maps that ``quantization`` replaces, with the maps and their bits, in order."""
    found: dict[str, tuple[Linear, int]] = {}
    for name, module in model.named_modules():
        bits = quantization.bits_of(name)
        if isinstance(module, Linear) and bits < 16:
            found[name] = module, bits
    return found


def empty_quantized(linear: Linear, bits: int, quantization: Quantization) -> QuantizedLinear:
    """A quantised map in the place of ``linear``, all of whose weights are zero."""
    with torch.device(linear.weight.device):
        return QuantizedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits,
            quantization.group,
            quantization.activation_bits,
        )


def quantize_model(
    model: ModelT,
    quantization: Quantization,
    moments: dict[str, Tensor] | None = None,
    *,
    weights: bool = True,
) -> ModelT:
    """Replace the large linear maps of a model by quantised ones, in place.

    Args:
        model: any module; its :class:`Linear` maps are replaced, except gates.
        quantization: the scheme.
        moments: second moments of the inputs of every map, by name, for ``method="importance"``.
        weights: quantise the weights too; False leaves them zero, for loading others.

    Returns:
        the model, whose attribute ``quantization`` says what it is.

    Raises:
        ValueError: the model is quantised already, or has no map to quantise, or weights that are not finite.
    """
    if getattr(model, "quantization", None) is not None:
        raise ValueError("the model is quantised already; quantise the original one")
    found = quantizable(model, quantization)
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear map to quantise")
    for name, (linear, bits) in found.items():
        new = empty_quantized(linear, bits, quantization)
        if weights:
            packed = quantize(
                linear.weight.detach(),
                bits,
                group=quantization.group,
                method=quantization.method,
                importance=None if moments is None else moments.get(name),
                name=f"'{name}.weight'",
            )
            new.weight, new.scales = packed
            new.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(model.training))
    model.quantization = quantization  # pyright: ignore[reportArgumentType]
    return model


__all__ = [
    "GROUPS",
    "Quantization",
    "QuantizedLinear",
    "empty_quantized",
    "quantizable",
    "quantize_model",
]
