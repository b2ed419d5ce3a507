"""The Transformer baseline: parity with another implementation, a cache that knows its rows, checkpoints."""

from __future__ import annotations

import pytest
import torch

from openxlstm import Generator, load_pretrained, save_pretrained
from openxlstm.checkpoint import convert
from openxlstm.models import TransformerLM, TransformerLMConfig
from openxlstm.state import ModelState, leaves

CONFIG = TransformerLMConfig(32, 4, 2, 50, num_kv_heads=2)


def test_equals_the_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=CONFIG.ffn_hidden_dim, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=CONFIG.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        )
    ).double().eval()  # fmt: skip
    names = {
        "model.embed_tokens": "embedding", "model.layers": "blocks", "model.norm": "out_norm",
        "self_attn.o_proj": "attention.out_proj", "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v",
        "mlp.gate_proj": "ffn.proj_up_gate", "mlp.up_proj": "ffn.proj_up", "mlp.down_proj": "ffn.proj_down",
        "input_layernorm": "norm_attention", "post_attention_layernorm": "norm_ffn",
    }  # fmt: skip
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor
    ours = TransformerLM(CONFIG).double().eval()
    ours.load_state_dict(weights)
    tokens = torch.randint(50, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens).double(), theirs(tokens).logits.double(), rtol=1e-5, atol=1e-6
        )


def test_published_widths_of_the_feed_forward():
    for width, hidden in {768: 2048, 1024: 2752, 1536: 4096, 2048: 5504, 2560: 6848, 4096: 10944}.items():
        assert TransformerLMConfig(width, 16, 1, 10).ffn_hidden_dim == hidden


def test_rows_of_different_lengths_step_together_as_if_alone():
    model = TransformerLM(CONFIG).double().eval()
    prompts = [torch.randint(50, (1, n)) for n in (7, 3, 0)]
    states = [model.read(p) if p.numel() else model.initial_state(1) for p in prompts]
    joined = ModelState.stack(states)
    following = torch.randint(50, (3, 4))
    for t in range(4):
        logits, joined = model.step(following[:, t : t + 1], joined)
        for row in range(3):
            alone, states[row] = model.step(following[row : row + 1, t : t + 1], states[row])
            torch.testing.assert_close(logits[row], alone[0], rtol=1e-9, atol=1e-9)
    assert joined.blocks[0].length.tolist() == [11, 7, 4]
    kept = joined.select([2, 1])
    after, _ = model.step(following[:2, :1], kept)
    expected, _ = model.step(following[:1, :1], states[2])
    torch.testing.assert_close(after[0], expected[0], rtol=1e-9, atol=1e-9)


def test_a_document_boundary_empties_the_cache_of_its_row():
    model = TransformerLM(CONFIG).double().eval()
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[1, 4] = True
    tokens = torch.randint(50, (2, 6))
    state = model.read(tokens, reset=reset)
    assert state.blocks[0].length.tolist() == [6, 2]
    logits, _ = model.step(tokens[:, :1], state)
    alone, _ = model.step(tokens[1:, :1], model.read(tokens[1:, 4:]))
    torch.testing.assert_close(logits[1:], alone, rtol=1e-9, atol=1e-9)


def test_generates_saves_and_loads(tmp_path):
    model = TransformerLM(CONFIG)
    save_pretrained(model, tmp_path / "model")
    loaded, _ = load_pretrained(tmp_path / "model")
    assert isinstance(loaded, TransformerLM)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    generator = Generator(loaded, None, prefill_chunk=3)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    options = {"max_new_tokens": 6, "temperature": 0.0}
    together = [r.tokens for r in generator.complete(prompts, **options)]
    assert together == [generator.complete(p, **options).tokens for p in prompts]
    session = generator.start([1, 2, 3], temperature=0.0)
    assert len(leaves(session.state)) == 6
    with pytest.raises(ValueError, match="the reference package has no Transformer"):
        convert(tmp_path / "model", tmp_path / "other", to="reference")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide embedding_dim 32"),
        ({"num_heads": 32}, "even head dimension"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 must divide num_heads 4"),
        ({"num_blocks": 0}, "num_blocks must be positive, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"ffn_dim": 0}, "feed-forward width must be positive"),
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerLMConfig(
            **{"embedding_dim": 32, "num_heads": 4, "num_blocks": 1, "vocab_size": 9} | fields
        )


def test_states_of_other_models_are_refused():
    other = TransformerLM(TransformerLMConfig(32, 2, 2, 50))
    with pytest.raises(ValueError, match="other cells or widths"):
        TransformerLM(CONFIG)(torch.zeros(1, 2, dtype=torch.long), other.initial_state(1))
    with pytest.raises(ValueError, match="the state holds 3 sequences, the input 1"):
        other(torch.zeros(1, 2, dtype=torch.long), other.initial_state(3))
