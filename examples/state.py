"""The state of a language model is a value: fork it, stack it, keep it in a file."""

import torch

from openxlstm.models import build_model
from openxlstm.state import ModelState

model = build_model({"model_type": "xlstm_lm", "embedding_dim": 64, "num_blocks": 2, "vocab_size": 100})
prompt = torch.randint(100, (1, 50))
with torch.no_grad():
    logits, state = model(prompt, return_state=True)  # read once, in parallel
    state.save("prompt.state")
    four = ModelState.load("prompt.state").fork(4)  # four continuations of the same past
    tokens = torch.randint(100, (4, 1))
    for _ in range(10):  # constant time and memory per token
        logits, four = model.step(tokens, four)
        tokens = logits.argmax(-1)
print("bytes of state per sequence:", sum(leaf[0].nbytes for block in state.blocks for leaf in block[:1]))
print("next tokens:", tokens.flatten().tolist())
