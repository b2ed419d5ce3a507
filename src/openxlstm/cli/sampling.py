"""Sampling options that ``generate`` and ``chat`` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is not given keeps its default (or that of the resumed state)."""

    max_new_tokens: int | None = None
    """Stop after this many tokens; 256 unless given."""
    temperature: float | None = None
    """0 takes the most likely token, 1 samples what the model says; 0.8 unless given."""
    top_k: int | None = None
    """Keep only the k most likely tokens."""
    top_p: float | None = None
    """Keep the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that occurred less likely."""
    seed: int | None = None
    """Makes the text reproducible."""
    stop: tuple[str, ...] | None = None
    """Texts that end the generation."""
    dtype: str | None = None
    """Numeric type of the weights: float32 or bfloat16; as stored unless given."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, mps."""

    def given(self) -> dict[str, Any]:
        """The sampling fields that were given, for ``SamplingConfig.updated``."""
        names = {field.name for field in fields(SamplingOptions)} - {"dtype", "device"}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}
