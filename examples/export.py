"""A model as one graph: torch.export and torch.compile(fullgraph=True) see no breaks."""

import torch

from openxlstm.models import build_model

torch.manual_seed(0)
values = {"model_type": "xlstm_lm", "embedding_dim": 64, "num_blocks": 2, "slstm_at": [1], "vocab_size": 100}
model = build_model(values).eval()
tokens = torch.randint(100, (2, 48))
with torch.no_grad():
    program = torch.export.export(model, (tokens,))
    torch.export.save(program, "model.pt2")
    exported = torch.export.load("model.pt2").module()
    print("exported, same logits:", torch.allclose(exported(tokens), model(tokens), atol=1e-5))
    compiled = torch.compile(
        model, fullgraph=True, backend="aot_eager"
    )  # leave the backend out to generate code
    print("compiled, same logits:", torch.allclose(compiled(tokens), model(tokens), atol=1e-5))
