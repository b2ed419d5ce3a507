"""Quantised weights: packed int8 and int4 matrices, how they are made, and products with them."""

from openxlstm.ops.quantization.api import quantized_linear, round_activations
from openxlstm.ops.quantization.codes import (
    GROUPS,
    METHODS,
    Method,
    Packed,
    check_packed,
    check_scheme,
    dequantize,
    quantize,
)

__all__ = [
    "GROUPS",
    "METHODS",
    "Method",
    "Packed",
    "check_packed",
    "check_scheme",
    "dequantize",
    "quantize",
    "quantized_linear",
    "round_activations",
]
