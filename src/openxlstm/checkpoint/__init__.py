"""Model files, tokenizers, and the formats of other programs. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openxlstm.lazy import lazy_names

if TYPE_CHECKING:
    from openxlstm.checkpoint.pretrained import LAYOUTS, convert, load_pretrained, save_pretrained
    from openxlstm.checkpoint.quantization import quantize_checkpoint
    from openxlstm.checkpoint.reading import Checkpoint, read_checkpoint
    from openxlstm.checkpoint.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe

__all__ = [
    "END_OF_TEXT",
    "LAYOUTS",
    "Checkpoint",
    "Tokenizer",
    "byte_tokenizer",
    "convert",
    "load_pretrained",
    "quantize_checkpoint",
    "read_checkpoint",
    "save_pretrained",
    "train_bpe",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "END_OF_TEXT": "tokenizer",
        "LAYOUTS": "pretrained",
        "Checkpoint": "reading",
        "Tokenizer": "tokenizer",
        "byte_tokenizer": "tokenizer",
        "convert": "pretrained",
        "load_pretrained": "pretrained",
        "quantize_checkpoint": "quantization",
        "read_checkpoint": "reading",
        "save_pretrained": "pretrained",
        "train_bpe": "tokenizer",
    },
)
