"""Normalisation of heads with an output gate."""

from openxlstm.ops.normalization.api import head_norm

__all__ = ["head_norm"]
