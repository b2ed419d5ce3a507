"""Whole models: the block stack, the language models, the ``nn.LSTM``-shaped module, their accounting."""

from openxlstm.layers import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
)
from openxlstm.models.accounting import parameter_count, state_bytes, training_flops_per_token
from openxlstm.models.block_stack import xLSTMBlockStack, xLSTMBlockStackConfig
from openxlstm.models.language_model import LanguageModel
from openxlstm.models.large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModel, xLSTMLMModelConfig
from openxlstm.models.pattern import slstm_positions
from openxlstm.models.recurrent import xLSTM
from openxlstm.models.registry import MODEL_TYPES, build_config, build_model, model_type_of
from openxlstm.models.transformer import TransformerLM, TransformerLMConfig

__all__ = [
    "MODEL_TYPES",
    "FeedForwardConfig",
    "LanguageModel",
    "TransformerLM",
    "TransformerLMConfig",
    "build_config",
    "build_model",
    "mLSTMBlockConfig",
    "mLSTMLayerConfig",
    "model_type_of",
    "parameter_count",
    "sLSTMBlockConfig",
    "sLSTMLayerConfig",
    "slstm_positions",
    "state_bytes",
    "training_flops_per_token",
    "xLSTM",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
    "xLSTMLarge",
    "xLSTMLargeConfig",
]
