"""Operators: pure functions on tensors. The only layer that knows about kernels and devices."""

from openxlstm.ops.convolution import causal_convolution
from openxlstm.ops.cross_entropy import linear_cross_entropy
from openxlstm.ops.dense import linear
from openxlstm.ops.dispatch import explain
from openxlstm.ops.mlstm.advance import mlstm_advance
from openxlstm.ops.mlstm.api import mlstm, mlstm_initial_state, mlstm_step
from openxlstm.ops.normalization import head_norm
from openxlstm.ops.packing import reset_from_cu_seqlens, reset_from_document_ids
from openxlstm.ops.quantization import quantized_linear
from openxlstm.ops.rnn import rnn, rnn_initial_state, rnn_step

__all__ = [
    "causal_convolution",
    "explain",
    "head_norm",
    "linear",
    "linear_cross_entropy",
    "mlstm",
    "mlstm_advance",
    "mlstm_initial_state",
    "mlstm_step",
    "quantized_linear",
    "reset_from_cu_seqlens",
    "reset_from_document_ids",
    "rnn",
    "rnn_initial_state",
    "rnn_step",
]
