"""Live parity with the published programs, where they are installed: same weights, same logits, both ways."""

from __future__ import annotations

import pytest
import torch

from openxlstm.models import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLarge,
    xLSTMLargeConfig,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.xLSTMConfig(
        vocab_size=50,
        hidden_size=128,
        num_hidden_layers=2,
        num_heads=4,
        chunk_size=16,
        return_last_states=True,
    )
    model = transformers.xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # gates and the gated half of the feed-forward start at zero
    return model


def ours_for(hf):
    config = hf.config
    return xLSTMLarge(
        xLSTMLargeConfig(
            config.hidden_size,
            config.num_heads,
            config.num_hidden_layers,
            config.vocab_size,
            ffn_proj_factor=config.ffn_proj_factor,
        )
    )


def rename(weights, old, new):
    return {key.replace(old, new) if key.startswith(old) else key: value for key, value in weights.items()}


@torch.no_grad()
def test_hugging_face_weights_give_their_logits_here(hugging_face, rel_error):
    model = ours_for(hugging_face)
    model.load_state_dict(rename(hugging_face.state_dict(), "backbone.embeddings.", "embedding."))
    tokens = torch.randint(50, (2, 41))
    expected = hugging_face(tokens, use_cache=False).logits
    assert rel_error(model(tokens), expected) < 3e-4
    assert rel_error(expected, torch.zeros_like(expected) + expected.mean()) > 0.1


@torch.no_grad()
def test_our_weights_give_our_logits_there(hugging_face, rel_error):
    model = ours_for(hugging_face)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    hugging_face.load_state_dict(rename(model.state_dict(), "embedding.", "backbone.embeddings."))
    tokens = torch.randint(50, (2, 41))
    assert rel_error(hugging_face(tokens, use_cache=False).logits, model(tokens)) < 3e-4


@torch.no_grad()
def test_hugging_face_greedy_generation(hugging_face):
    model = ours_for(hugging_face)
    model.load_state_dict(rename(hugging_face.state_dict(), "backbone.embeddings.", "embedding."))
    prompt = torch.randint(3, 50, (1, 6))
    expected = hugging_face.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None)
    logits, state = model(prompt, return_state=True)
    tokens = [prompt, logits[:, -1:].argmax(-1)]
    for _ in range(9):
        logits, state = model.step(tokens[-1], state)
        tokens.append(logits.argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_published_block_stack(rel_error):
    xlstm = pytest.importorskip("xlstm", reason="the published package is not installed")
    theirs = xlstm.xLSTMBlockStack(
        xlstm.xLSTMBlockStackConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
            slstm_block=xlstm.sLSTMBlockConfig(
                slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4),
                feedforward=xlstm.FeedForwardConfig(),
            ),
            context_length=16,
            num_blocks=3,
            embedding_dim=64,
            slstm_at=[1],
        )
    )
    theirs.reset_parameters()
    ours = xLSTMBlockStack(
        xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=4)),
            slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=4)),
            context_length=16,
            num_blocks=3,
            embedding_dim=64,
            slstm_at=[1],
        )
    )
    x = torch.randn(2, 16, 64)
    ours.load_state_dict(theirs.state_dict())
    assert rel_error(ours(x), theirs(x)) < 3e-4
    ours.reset_parameters(torch.Generator().manual_seed(2))
    theirs.load_state_dict(ours.state_dict())
    assert rel_error(theirs(x), ours(x)) < 3e-4
