"""Quantised linear maps in modules: which are replaced, conversions, prompts and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openxlstm.layers.linear import Linear
from openxlstm.layers.quantized import Quantization, QuantizedLinear, quantizable, quantize_model
from openxlstm.models import build_model
from openxlstm.ops.quantization import dequantize, quantize

MODELS = {
    "stack": {
        "model_type": "xlstm_lm", "embedding_dim": 48, "num_blocks": 2, "vocab_size": 50, "slstm_at": [1],
        "bias": True,
    },
    "large": {
        "model_type": "xlstm_large", "embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "vocab_size": 50,
    },
    "fused": {
        "model_type": "xlstm_large", "embedding_dim": 80, "num_heads": 2, "num_blocks": 1, "vocab_size": 50,
        "weight_mode": "fused", "use_bias": True,
    },
}  # fmt: skip


@pytest.fixture(params=sorted(MODELS))
def model(request):
    made = build_model(MODELS[request.param]).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def test_what_is_replaced(model):
    gates = {n: p.clone() for n, p in model.named_parameters() if "gate" in n.split(".")[-2]}
    quantize_model(model, Quantization(bits=4, head_bits=8))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, Linear | QuantizedLinear)}
    for name, kind in kinds.items():
        is_gate = name.split(".")[-1] in ("igate", "fgate", "igate_preact", "fgate_preact", "ifgate_preact")
        assert (kind is Linear) == is_gate, name
    assert model.lm_head.bits == 8
    assert {m.bits for n, m in model.named_modules() if type(m) is QuantizedLinear and n != "lm_head"} == {4}
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in gates.items() if n in parameters)
    assert "bits=4, group=32" in repr(model)


@pytest.mark.parametrize(("bits", "group", "tolerance"), [(8, 32, 0.05), (4, 32, 0.4), (4, 64, 0.5)])
def test_logits_stay_close_and_steps_follow_the_sequence(model, rel_error, bits, group, tolerance):
    tokens = torch.randint(0, 50, (2, 20))
    with torch.inference_mode():
        before = model(tokens)
        quantize_model(model, Quantization(bits=bits, group=group))
        logits, state = model(tokens, return_state=True)
        assert 0 < rel_error(logits, before) < tolerance
        state = None
        for t in range(20):
            step, state = model.step(tokens[:, t : t + 1], state)
            assert rel_error(step[:, 0], logits[:, t]) < 2e-3


def test_module_equals_dequantised_linear(rel_error):
    linear = Linear(80, 24)
    packed = quantize(linear.weight.detach(), 4)
    module = QuantizedLinear(80, 24, True, 4, 32)
    assert (module.dequantized() == 0).all()
    module.weight, module.scales, module.bias = *packed, linear.bias
    x = torch.randn(2, 7, 80)
    expected = x @ dequantize(*packed, 80).T + linear.bias
    with torch.no_grad():
        assert rel_error(module(x), expected) < 1e-4
        module.activation_bits = 8
        assert rel_error(module(x), expected) > 1e-3
        assert rel_error(module(x[:, :1]), expected[:, :1]) < 1e-4  # single steps: always 16 bits


def test_conversions_leave_codes_and_scales_alone():
    for bits in (8, 4):
        module = QuantizedLinear(40, 8, True, bits, 32)
        module.scales = torch.rand(module.scales.shape).to(module.scales.dtype)
        before = module.scales.clone()
        module.bfloat16()
        assert module.bias is not None
        assert module.bias.dtype == torch.bfloat16
        module.float().half().double()
        assert torch.equal(module.scales, before)
        assert module.scales.dtype == before.dtype
        assert module.to("meta").scales.device.type == "meta"


def test_gradients_flow_to_the_input(model):
    quantize_model(model, Quantization())
    logits = model(torch.randint(0, 50, (1, 6)))
    logits.square().mean().backward()
    gradient = next(p.grad for n, p in model.named_parameters() if "embedding" in n)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_what_is_refused(model):
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'lm_head.weight' holds NaN or infinite"):
        quantize_model(model, Quantization())
    with pytest.raises(ValueError, match="has no linear map to quantise"):
        quantize_model(torch.nn.Linear(3, 3), Quantization())
    whole = quantize_model(build_model(MODELS["large"]), Quantization())
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(whole, Quantization())
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bits": 5}, "bits must be 8 or 4, got 5"),
        ({"activation_bits": 4}, "activation_bits must be 16 or 8, got 4"),
        ({"head_bits": 2}, "head_bits must be 4, 8 or 16, got 2"),
        ({"method": "best"}, "method must be one of plain, error-aware, importance"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            Quantization(**options)
    assert len(quantizable(build_model(MODELS["large"]), Quantization(head_bits=16))) == 2 * 8
