"""Model files, tokenizers, and the formats of other programs."""

from openxlstm.checkpoint.pretrained import LAYOUTS, convert, load_pretrained, save_pretrained
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
    "read_checkpoint",
    "save_pretrained",
    "train_bpe",
]
