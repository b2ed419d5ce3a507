"""The decode engine of GPUs. Without a GPU nothing is recorded: the same step runs over slots, directly."""

from __future__ import annotations

import pytest
import torch

from openxlstm.inference import graph_engine
from openxlstm.inference.graph_engine import GraphEngine, why_not
from openxlstm.inference.runner import ModelRunner
from openxlstm.models import build_model
from openxlstm.models.transformer import TransformerLM, TransformerLMConfig
from openxlstm.state import leaves


@pytest.fixture(params=["large", "blocks"])
def model(request):
    """A small model of each family, the second with scalar cells and convolutions."""
    large = {"model_type": "xlstm_large", "embedding_dim": 32, "num_heads": 2, "num_blocks": 2}
    blocks = {
        "model_type": "xlstm_lm", "embedding_dim": 16, "num_blocks": 2, "slstm_at": [1],
        "mlstm_block": {"mlstm": {"num_heads": 2}}, "slstm_block": {"slstm": {"num_heads": 2}},
    }  # fmt: skip
    return build_model((large if request.param == "large" else blocks) | {"vocab_size": 17}).train()


@pytest.fixture
def engine(model, monkeypatch):
    """On the CPU: nothing refused, nothing recorded."""
    monkeypatch.setattr(graph_engine, "why_not", lambda _: None)
    monkeypatch.setattr(graph_engine, "record", lambda function: function)
    return GraphEngine(model)


def test_equals_the_models_steps(model, engine):
    """Three rows (a batch of four to the engine), kept and in place, through a growth of the slots."""
    runner = ModelRunner(model, decode="model")
    held = engine.open(rows=3)
    expected_state = held.state()
    for step in range(4):
        tokens = [step, step + 5, 2 * step]
        kept = held
        logits, held = engine.step(tokens, held, reuse=step % 2 == 1)
        expected, expected_state = runner.step(tokens, expected_state)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(leaves(held.state()), leaves(expected_state), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert (held is kept) == (step % 2 == 1)
    assert model.training


def test_rows_do_not_meet_and_slots_return(model, engine):
    held = engine.open(rows=2)
    other = engine.open(rows=1)
    before = [leaf.clone() for leaf in leaves(other.state())]
    logits, held = engine.step([3, 4], held, reuse=True)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(other.state()), strict=True))
    alone, _ = engine.step([3], engine.open(rows=1), reuse=False)
    torch.testing.assert_close(alone[0], logits[0], rtol=1e-5, atol=1e-6)
    free = len(engine._free)
    held = held.select([1])
    assert len(engine._free) == free + 1
    assert 0 not in engine._free  # the spare slot is never given out
    with pytest.raises(ValueError, match="out of range for a vocabulary of 17"):
        engine.step([17], held, reuse=True)


def test_one_recording_per_batch_size(model, engine, monkeypatch):
    recorded = []
    monkeypatch.setattr(graph_engine, "record", lambda function: recorded.append(1) or function)
    held = engine.open(rows=8)
    for rows in (8, 7, 5, 4, 3, 1):
        held = held.select(range(rows))
        _, held = engine.step([1] * rows, held, reuse=True)
    assert len(recorded) == 3  # 8, 4 and 1


def test_refusals_are_one_line(model):
    assert why_not(model) == "CUDA graphs need a GPU, and the model is on cpu"
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        GraphEngine(model)
    transformer = TransformerLM(TransformerLMConfig(16, 2, 1, 17))
    assert graph_engine._grows(transformer.initial_state(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_on_a_gpu(model):
    model = model.cuda()
    assert "CUDA graphs" in ModelRunner(model).explain()
    engine = GraphEngine(model)
    held = engine.open(rows=3)
    state = held.state()
    for step in range(3):
        logits, held = engine.step([step, 1, 2], held, reuse=True)
        expected, state = ModelRunner(model, decode="model").step([step, 1, 2], state)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
