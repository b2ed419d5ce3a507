"""Live parity with the published programs, where they are installed: same weights, same logits, both ways."""

from __future__ import annotations

import pytest
import torch

import openxlstm.models
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

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


BLOCK_STACKS = [
    {"num_blocks": 3, "slstm_at": [1]},
    {"slstm_at": [0], "slstm": {"function": "lstm"}},
    {"bias": True, "mlstm": {"num_heads": 2, "proj_factor": 1.3, "qkv_proj_blocksize": 8}},
    {
        "slstm_at": "all",
        "slstm": {"conv1d_kernel_size": 0, "recurrent_weight_init": "standard", "group_norm_weight": False},
        "feedforward": {"act_fn": "swish", "proj_factor": 2.0},
    },
    {"slstm_at": "all", "feedforward": {"act_fn": "relu^2", "bias": True}, "add_post_blocks_norm": False},
    {
        "slstm_at": "all",
        "slstm": {"bias_init": "small_init", "num_heads": 8, "conv1d_kernel_size": 2},
        "feedforward": {"act_fn": "selu"},
    },
]


def block_stack(package, mlstm=None, slstm=None, feedforward=None, num_blocks=2, **fields):
    """The same stack from the published package or from this one."""
    return package.xLSTMBlockStack(
        package.xLSTMBlockStackConfig(
            mlstm_block=package.mLSTMBlockConfig(mlstm=package.mLSTMLayerConfig(**mlstm or {})),
            slstm_block=package.sLSTMBlockConfig(
                slstm=package.sLSTMLayerConfig(backend="vanilla", **slstm or {}),
                feedforward=package.FeedForwardConfig(**feedforward or {}),
            ),
            context_length=16,
            embedding_dim=64,
            num_blocks=num_blocks,
            **{"slstm_at": [], **fields},
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("fields", BLOCK_STACKS)
def test_published_block_stack(rel_error, fields):
    xlstm = pytest.importorskip("xlstm", reason="the published package is not installed")
    theirs, ours = block_stack(xlstm, **fields), block_stack(openxlstm.models, **fields)
    theirs.reset_parameters()
    x = torch.randn(2, 16, 64)
    ours.load_state_dict(theirs.state_dict())
    assert rel_error(ours(x), theirs(x)) < 3e-4
    ours.reset_parameters(torch.Generator().manual_seed(2))
    theirs.load_state_dict(ours.state_dict())
    assert rel_error(theirs(x), ours(x)) < 3e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_bias": True, "qk_dim_factor": 1.0, "v_dim_factor": 0.5},
        {
            "norm_reduction_force_float32": False,
            "gate_soft_cap": 5.0,
            "output_logit_soft_cap": 10.0,
            "weight_mode": "fused",
        },
    ],
)
def test_published_large(rel_error, fields):
    large = pytest.importorskip("xlstm.xlstm_large.model", reason="the published package is not installed")
    size = {"embedding_dim": 128, "num_heads": 4, "num_blocks": 2, "vocab_size": 50}
    config = large.xLSTMLargeConfig(
        **size,
        **fields,
        return_last_states=True,
        mode="inference",
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
    )
    theirs, ours = large.xLSTMLarge(config), xLSTMLarge(xLSTMLargeConfig(**size, **fields))
    tokens = torch.randint(50, (2, 33))
    ours.load_state_dict(theirs.state_dict())
    assert rel_error(ours(tokens), theirs(tokens)[0]) < 3e-4
    ours.reset_parameters(torch.Generator().manual_seed(2))
    theirs.load_state_dict(ours.state_dict())
    assert rel_error(theirs(tokens)[0], ours(tokens)) < 3e-4
