"""Gates, half-lives and retrieval agree with the operators' definitions."""

from __future__ import annotations

import math

import pytest
import torch

from openxlstm.evaluation.networks import NETWORKS
from openxlstm.evaluation.probes import probe
from openxlstm.models import build_model

STACK = {"model_type": "xlstm_lm", "embedding_dim": 32, "num_blocks": 2, "slstm_at": [1], "vocab_size": 50}
LARGE = {"model_type": "xlstm_large", "embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize("values", [STACK, LARGE, LARGE | {"weight_mode": "fused"}])
def test_shapes_and_sums(values: dict) -> None:
    model = build_model(values)
    found = probe(model, torch.randint(50, (1, 20)))
    assert [p.block for p in found] == [0, 1]
    for p in found:
        heads = len(p.half_life)
        assert p.input_gate.shape == p.forget_gate.shape == (heads, 20)
        assert ((p.forget_gate >= 0) & (p.forget_gate <= 1)).all()
        if p.retrieval is not None and p.distance is not None:
            assert torch.allclose(p.retrieval.sum(-1), torch.ones(heads, 20, dtype=torch.float64))
            assert not p.retrieval.triu(1).any()
            assert ((p.distance >= 0) & (p.distance < 20)).all()
    assert not any(module._forward_hooks for module in model.modules())


def test_half_life_of_known_gates() -> None:
    model = build_model({**STACK, "slstm_at": []})
    with torch.no_grad():
        for block in model.xlstm_block_stack.blocks:  # type: ignore[union-attr]
            block.xlstm.mlstm_cell.fgate.weight.zero_()
            block.xlstm.mlstm_cell.fgate.bias.fill_(math.log(0.9 / 0.1))
    (first, _) = probe(model, torch.randint(50, (1, 30)))
    assert torch.allclose(
        first.half_life, torch.full((4,), math.log(2) / -math.log(0.9), dtype=torch.float64)
    )
    assert torch.allclose(first.forget_gate, torch.full((4, 30), 0.9, dtype=torch.float64))


def test_what_an_slstm_keeps_is_what_its_states_say() -> None:
    """With one cell per head, n_t exp(m_t) = kept part + exp(i_t): the share kept follows from states and
    gate."""
    layer = {"slstm": {"num_heads": 32}, "feedforward": None}
    model = build_model({**STACK, "slstm_at": "all", "num_blocks": 1, "slstm_block": layer}).eval()
    torch.nn.init.normal_(model.xlstm_block_stack.blocks[0].xlstm.slstm_cell._recurrent_kernel_)  # type: ignore
    tokens, state = torch.randint(50, (1, 12)), None
    (found,) = probe(model, tokens)
    for time in range(12):
        with torch.no_grad():
            _, state = model.step(tokens[:, time : time + 1], state)
        cell = state.blocks[0].cell  # (1, 32, 1)
        written = (found.input_gate[:, time] - cell.m[0, :, 0].double()).exp() / cell.n[0, :, 0].double()
        assert torch.allclose(found.forget_gate[:, time], 1 - written, atol=1e-5)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(1, T\), got \(2, 5\)"):
        probe(build_model(STACK), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="a RecurrentLM has no mLSTM or sLSTM blocks"):
        probe(NETWORKS["lstm"].build(5, 8, 1), torch.zeros(1, 5, dtype=torch.long))
