"""The decode engine with quantised weights: equal to the model, rows independent bit for bit."""

from __future__ import annotations

import pytest
import torch

from openxlstm.inference import Generator
from openxlstm.inference.engine import DecodeEngine, why_not
from openxlstm.layers.quantized import Quantization, quantize_model
from openxlstm.models import build_model
from openxlstm.ops.native import loader

MODELS = {
    "large": {"model_type": "xlstm_large", "embedding_dim": 80, "num_heads": 2, "num_blocks": 2},
    "fused": {
        "model_type": "xlstm_large", "embedding_dim": 64, "num_heads": 2, "num_blocks": 2,
        "weight_mode": "fused", "use_bias": True,
    },
    "mixed": {
        "model_type": "xlstm_lm", "embedding_dim": 48, "num_blocks": 3, "slstm_at": [1], "bias": True,
        "slstm_block": {"slstm": {"num_heads": 2}, "feedforward": {"bias": True}},
    },
}  # fmt: skip


@pytest.fixture(params=[(8, 32), (4, 32), (4, 64)], ids=str)
def scheme(request):
    if reason := loader.unavailable():
        pytest.skip(reason)
    return Quantization(bits=request.param[0], group=request.param[1])


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_equals_the_model_and_rows_are_independent(kind, scheme):
    model = build_model({**MODELS[kind], "vocab_size": 77}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    quantize_model(model, scheme)
    assert why_not(model) is None
    tokens = torch.randint(0, 77, (3, 16))
    with torch.no_grad():
        expected = model(tokens)
    engine = DecodeEngine(model)
    together, alone = engine.open(rows=3), [engine.open() for _ in range(3)]
    for t in range(16):
        logits, together = engine.step(tokens[:, t].tolist(), together, reuse=True)
        # activations that differ in a last bit may round to neighbouring integers of 16 bits
        torch.testing.assert_close(logits, expected[:, t], rtol=2e-3, atol=1e-3)
        for row in range(3):
            single, alone[row] = engine.step([int(tokens[row, t])], alone[row], reuse=True)
            assert torch.equal(single[0], logits[row])


def test_the_generator_uses_it(scheme):
    model = quantize_model(build_model({**MODELS["large"], "vocab_size": 77}).eval(), scheme)
    results = [
        Generator(model, None).complete([[1, 2, 3], [4, 5]], max_new_tokens=6, temperature=0),
        Generator(model, None).complete([[1, 2, 3]], max_new_tokens=6, temperature=0),
    ]
    assert results[0][0].tokens == results[1][0].tokens
