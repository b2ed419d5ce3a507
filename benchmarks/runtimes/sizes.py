"""Shapes of the Transformers that stand beside our sizes: as many parameters, within 1.2 percent."""

from __future__ import annotations

from dataclasses import dataclass

from openxlstm.models import TransformerLMConfig, parameter_count

VOCABULARY = 50304


@dataclass(frozen=True)
class Llama:
    """A Llama with as many key heads as query heads, an untied head, and a vocabulary of 50,304."""

    width: int
    layers: int
    heads: int
    hidden: int

    @property
    def config(self) -> TransformerLMConfig:
        """The same model here."""
        return TransformerLMConfig(self.width, self.heads, self.layers, VOCABULARY, ffn_dim=self.hidden)

    @property
    def weights(self) -> int:
        """Numbers that a decoded token reads: all but the embedding and the norms."""
        return self.parameters - self.width * VOCABULARY - (2 * self.layers + 1) * self.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        return parameter_count(self.config)

    @property
    def cache_numbers(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.width


LLAMAS = {
    "xlstm-160m": Llama(width=768, layers=12, heads=12, hidden=2048),
    "xlstm-400m": Llama(width=1024, layers=24, heads=16, hidden=2752),
}
