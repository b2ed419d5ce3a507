"""Bits per byte of a model on a text, streamed in constant memory, and how much each token of past is
worth."""

import torch

from openxlstm.checkpoint import byte_tokenizer
from openxlstm.evaluation.context import cut_rows, loss_by_context
from openxlstm.evaluation.text import Piece, score_stream
from openxlstm.models import build_model

torch.manual_seed(0)
model = build_model({"model_type": "xlstm_lm", "embedding_dim": 64, "num_blocks": 2, "vocab_size": 257})
tokenizer = byte_tokenizer()
text = "A text of any length, read piece by piece. " * 100
tokens = tokenizer.encode(text, bos=False)
score = score_stream(model, tokenizer, [[Piece(tokens, len(text))]])
print(f"bits per byte: {score.bits_per_byte:.3f} over {score.tokens} tokens")
print("past that matters:", loss_by_context(model, cut_rows(tokens, 200, 4)).effective, "tokens")
