"""Layers: norms, causal convolution, mLSTM and sLSTM layers, feed-forward, residual blocks.

Every sequence layer and block has ``forward(x, state=None, *, return_state=False, reset=None)``,
``step(x, state)`` for one position and ``initial_state(batch_size, device)``.
"""

from openxlstm.layers.blocks import mLSTMBlock, mLSTMBlockConfig, sLSTMBlock, sLSTMBlockConfig
from openxlstm.layers.causal_conv import CausalConv1d
from openxlstm.layers.feedforward import FeedForward, FeedForwardConfig
from openxlstm.layers.large import LargeFeedForward, mLSTMLargeBlock, mLSTMLargeLayer
from openxlstm.layers.linear import Linear, LinearHeadwise
from openxlstm.layers.mlstm_layer import mLSTMCell, mLSTMLayer, mLSTMLayerConfig
from openxlstm.layers.norms import LayerNorm, MultiHeadLayerNorm, PlainMultiHeadLayerNorm, RMSNorm
from openxlstm.layers.slstm_layer import sLSTMCell, sLSTMLayer, sLSTMLayerConfig
from openxlstm.layers.soft_cap import soft_cap

__all__ = [
    "CausalConv1d",
    "FeedForward",
    "FeedForwardConfig",
    "LargeFeedForward",
    "LayerNorm",
    "Linear",
    "LinearHeadwise",
    "MultiHeadLayerNorm",
    "PlainMultiHeadLayerNorm",
    "RMSNorm",
    "mLSTMBlock",
    "mLSTMBlockConfig",
    "mLSTMCell",
    "mLSTMLargeBlock",
    "mLSTMLargeLayer",
    "mLSTMLayer",
    "mLSTMLayerConfig",
    "sLSTMBlock",
    "sLSTMBlockConfig",
    "sLSTMCell",
    "sLSTMLayer",
    "sLSTMLayerConfig",
    "soft_cap",
]
