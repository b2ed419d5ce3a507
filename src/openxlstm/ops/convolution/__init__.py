"""Depthwise causal convolution over time."""

from openxlstm.ops.convolution.api import causal_convolution

__all__ = ["causal_convolution"]
