"""The table of language models: names for configuration files, and construction from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openxlstm.config import config_from_dict, nearest_name
from openxlstm.models.language_model import LanguageModel
from openxlstm.models.large import xLSTMLarge, xLSTMLargeConfig
from openxlstm.models.lm_model import xLSTMLMModel, xLSTMLMModelConfig
from openxlstm.models.transformer import TransformerLM, TransformerLMConfig

ModelConfig = xLSTMLMModelConfig | xLSTMLargeConfig | TransformerLMConfig

MODEL_TYPES: dict[str, tuple[type[Any], type[LanguageModel]]] = {
    "xlstm_lm": (xLSTMLMModelConfig, xLSTMLMModel),
    "xlstm_large": (xLSTMLargeConfig, xLSTMLarge),
    "transformer_lm": (TransformerLMConfig, TransformerLM),
}
"""Name of a model type -> its configuration class and model class."""


def build_config(values: Mapping[str, Any], *, where: str = "") -> ModelConfig:
    """Build a model configuration from a mapping with a ``model_type`` entry.

    Args:
        values: ``model_type`` and the fields of its configuration.
        where: prefix of field names in messages, such as ``"model."``.

    Raises:
        ValueError: no or unknown ``model_type``, or fields that don't fit it.
    """
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        hint = nearest_name(str(model_type), MODEL_TYPES)
        raise ValueError(
            f"{where}model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}.{hint}"
        )
    return config_from_dict(MODEL_TYPES[model_type][0], values, where=where)


def build_model(config: ModelConfig | Mapping[str, Any]) -> LanguageModel:
    """Build a language model with fresh initial values.

    Args:
        config: a model's configuration, or a mapping of its fields with a ``model_type`` entry.

    Raises:
        ValueError: unknown model type or field, or widths that don't fit together.
    """
    if isinstance(config, Mapping):
        config = build_config(config)
    for config_class, model_class in MODEL_TYPES.values():
        if type(config) is config_class:
            return model_class(config)  # pyright: ignore[reportCallIssue]
    raise ValueError(f"{type(config).__name__} is not the configuration of a language model")


def model_type_of(model: LanguageModel) -> str:
    """Name of the model's type in :data:`MODEL_TYPES`.

    Raises:
        ValueError: not a registered model.
    """
    for name, (_, model_class) in MODEL_TYPES.items():
        if type(model) is model_class:
            return name
    raise ValueError(f"{type(model).__name__} is not a registered model; known: {', '.join(MODEL_TYPES)}")
