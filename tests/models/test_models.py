"""What every model must do: run both ways, hand states over, keep documents apart, compile, export."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openxlstm.models import (
    MODEL_TYPES,
    FeedForwardConfig,
    TransformerLMConfig,
    build_model,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    model_type_of,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from openxlstm.models.language_model import state_layout
from openxlstm.ops import dispatch
from openxlstm.state import KVCache, ModelState, leaves

VOCABULARY = 40
CONFIGS = {
    "mixed": xLSTMLMModelConfig(vocab_size=40, embedding_dim=16, num_blocks=3, slstm_at=[1]),
    "mlstm": xLSTMLMModelConfig(
        mLSTMBlockConfig(mLSTMLayerConfig(conv1d_kernel_size=0)), vocab_size=40, embedding_dim=16, bias=True
    ),
    "slstm": xLSTMLMModelConfig(
        slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(conv1d_kernel_size=0, num_heads=2)),
        vocab_size=40,
        embedding_dim=16,
        num_blocks=2,
        tie_weights=True,
    ),
    "lstm": xLSTMLMModelConfig(
        slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(function="lstm", group_norm_weight=False), None),
        vocab_size=40,
        embedding_dim=16,
        add_post_blocks_norm=False,
    ),
    "large": xLSTMLargeConfig(16, 2, 2, 40),
    "large fused": xLSTMLargeConfig(16, 2, 1, 40, weight_mode="fused", use_bias=True, qk_dim_factor=1.0),
    "transformer": TransformerLMConfig(16, 4, 2, 40),
    "transformer grouped": TransformerLMConfig(16, 4, 1, 40, num_kv_heads=2, tie_weights=True, ffn_dim=20),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """A float64 model whose gates and recurrent weights are not at their initial zeros."""
    model = build_model(CONFIGS[request.param]).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name or "recurrent" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def recurrent_leaves(state):
    """Leaves that must be float32 whatever the model is: all but caches of keys and values."""
    return [leaf for block in state.blocks if not isinstance(block, KVCache) for leaf in leaves(block)]


def tokens(batch, time):
    return torch.randint(VOCABULARY, (batch, time))


def test_every_registered_model_trains_a_step():
    configs = {
        "xlstm_lm": {"vocab_size": 40, "embedding_dim": 16, "num_blocks": 2, "slstm_at": [1]},
        "xlstm_large": {"embedding_dim": 16, "num_heads": 2, "num_blocks": 2, "vocab_size": 40},
        "transformer_lm": {"embedding_dim": 16, "num_heads": 2, "num_blocks": 2, "vocab_size": 40},
    }
    assert configs.keys() == MODEL_TYPES.keys()
    for name, fields in configs.items():
        model = build_model({"model_type": name, **fields})
        assert model_type_of(model) == name
        assert model.vocab_size == 40
        x = tokens(2, 7)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
        losses = []
        for _ in range(5):
            logits = model(x[:, :-1])
            assert logits.shape == (2, 6, 40)
            assert logits.dtype == torch.float32
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("split", [0, 1, 4, 9])
def test_sequence_and_steps_hand_over_anywhere(model, split):
    x = tokens(2, 9)
    expected, last = model(x, return_state=True)
    logits, state = model(x[:, :split], return_state=True)
    outputs = [logits]
    kept = state.clone()
    for t in range(split, 9):  # from the sequence form into steps
        logits, state = model.step(x[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-6, atol=1e-8)
    for a, b in zip(leaves(state), leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    second = model(x[:, split:], kept, return_state=False)  # and into another sequence
    torch.testing.assert_close(second, expected[:, split:], rtol=1e-6, atol=1e-8)

    state = None
    for t in range(split):  # from steps into the sequence form
        _, state = model.step(x[:, t : t + 1], state)
    second = model(x[:, split:], state, return_state=False)
    torch.testing.assert_close(second, expected[:, split:], rtol=1e-6, atol=1e-8)


def test_states_are_values(model):
    x = tokens(2, 5)
    _, state = model(x, return_state=True)
    before = state.clone()
    model(x, state)
    model.step(x[:, :1], state)
    for a, b in zip(leaves(state), leaves(before), strict=True):
        assert torch.equal(a, b)
    assert all(not leaf.any() for leaf in leaves(model.initial_state(2)))
    assert state_layout(state) == state_layout(model.initial_state(2))


def test_gradient_through_the_state(model):
    x = tokens(2, 8)
    parameters = list(model.parameters())
    loss = model(x, return_state=False).square().sum()
    expected = torch.autograd.grad(loss, parameters)
    first, state = model(x[:, :3], return_state=True)
    second = model(x[:, 3:], state, return_state=False)
    loss = first.square().sum() + second.square().sum()
    for a, b in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_documents_in_a_row_are_kept_apart(model):
    x, starts = tokens(1, 11), [3, 4, 8]
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, starts] = True
    _, before = model(tokens(1, 3), return_state=True)
    logits, state = model(x, before, reset=reset, return_state=True)
    bounds = [0, *starts, 11]
    alone = [
        model(x[:, a:b], before if a == 0 else None, return_state=True) for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(logits, torch.cat([y for y, _ in alone], 1), rtol=1e-6, atol=1e-8)
    for a, b in zip(leaves(state), leaves(alone[-1][1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cut", [1, 5])
def test_no_gradient_crosses_a_document_boundary(cut):
    for slstm_at in ([], "all"):
        stack = xLSTMBlockStack(xLSTMBlockStackConfig(num_blocks=2, embedding_dim=16, slstm_at=slstm_at))
        x = torch.randn(2, 9, 16, requires_grad=True)
        reset = torch.zeros(2, 9, dtype=torch.bool)
        reset[0, cut] = True
        y = stack(x, reset=reset)
        (gradient,) = torch.autograd.grad(y[:, cut:].square().sum(), x)
        assert gradient[0, :cut].abs().max() == 0
        assert gradient[1, :cut].abs().max() > 0


def test_rows_do_not_see_each_other(model):
    x = tokens(3, 6)
    expected = model(x, return_state=False)
    other = x.clone()
    other[1:] = tokens(2, 6)
    assert torch.equal(model(other, return_state=False)[0], expected[0])
    torch.testing.assert_close(model(x[1:2], return_state=False)[0], expected[1])


def test_later_tokens_have_no_influence(model):
    x = tokens(1, 8)
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % VOCABULARY
    a, b = model(x, return_state=False), model(other, return_state=False)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_empty_sequence_leaves_the_state_alone(model):
    _, state = model(tokens(2, 4), return_state=True)
    logits, same = model(tokens(2, 0), state, return_state=True)
    assert logits.shape == (2, 0, VOCABULARY)
    for a, b in zip(leaves(same), leaves(state), strict=True):
        assert torch.equal(a, b)


def test_states_save_select_and_fork(model, tmp_path):
    x = tokens(3, 5)
    _, state = model(x, return_state=True)
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors")
    next_token = tokens(3, 1)
    expected, _ = model.step(next_token, state)
    assert torch.equal(model.step(next_token, loaded)[0], expected)
    torch.testing.assert_close(model.step(next_token[1:2], state.select(1))[0], expected[1:2])
    forked, _ = model.step(next_token.repeat_interleave(2, 0), state.fork(2))
    torch.testing.assert_close(forked, expected.repeat_interleave(2, 0))


def test_bfloat16_keeps_float32_states_and_logits(model):
    model = model.bfloat16()
    logits, state = model(tokens(2, 5), return_state=True)
    assert logits.dtype == torch.float32
    assert all(leaf.dtype == torch.float32 for leaf in recurrent_leaves(state))
    logits, state = model.step(tokens(2, 1), state)
    assert logits.dtype == torch.float32
    assert all(leaf.dtype == torch.float32 for leaf in recurrent_leaves(state))
    assert all(leaf.dtype == torch.float32 for leaf in recurrent_leaves(model.initial_state(2)))


def test_autocast(model):
    model, x = model.float(), tokens(2, 5)
    expected = model(x, return_state=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(x, return_state=True)
    assert logits.dtype == torch.float32
    assert all(leaf.dtype == torch.float32 for leaf in recurrent_leaves(state))
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_activation_checkpointing(model):
    x = tokens(2, 6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x, return_state=False).square().sum(), parameters)
    logits = checkpoint(lambda t: model(t, return_state=False), x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(logits.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_only_acts_in_training():
    stack = xLSTMBlockStack(xLSTMBlockStackConfig(num_blocks=2, embedding_dim=16, dropout=0.5, slstm_at=[1]))
    x = torch.randn(1, 4, 16)
    assert not torch.equal(stack(x), stack(x))
    stack.eval()
    assert torch.equal(stack(x), stack(x))
    config = xLSTMLMModelConfig(vocab_size=40, embedding_dim=16, dropout=0.5, add_embedding_dropout=True)
    model, t = build_model(config), tokens(1, 4)
    assert not torch.equal(model.emb_dropout(torch.ones(20)), torch.ones(20))
    model.eval()
    assert torch.equal(model(t), model(t))


def test_published_defaults_run():
    x = torch.randn(2, 5, 128)
    assert xLSTMBlockStack(xLSTMBlockStackConfig())(x).shape == x.shape
    config = xLSTMBlockStackConfig(context_length=3, slstm_block=sLSTMBlockConfig())
    assert xLSTMBlockStack(config)(x).shape == x.shape  # longer than context_length
    assert config.block_map == ["s"]
    assert isinstance(build_model(xLSTMLargeConfig(16, 2, 1, 40))(tokens(2, 5)), torch.Tensor)


def test_return_last_states_is_honoured():
    model = build_model(xLSTMLargeConfig(16, 2, 1, 40, return_last_states=True))
    logits, state = model(tokens(2, 5))
    assert isinstance(state, ModelState)
    assert torch.equal(model(tokens(2, 5) * 0, return_state=False), model(tokens(2, 5) * 0)[0])
    assert logits.shape == (2, 5, 40)


def test_feedforward_of_the_stack_gets_its_width_and_dropout():
    block = sLSTMBlockConfig(feedforward=FeedForwardConfig(act_fn="swish"))
    config = xLSTMBlockStackConfig(slstm_block=block, embedding_dim=16, dropout=0.25)
    stack = xLSTMBlockStack(config)
    assert stack.blocks[0].ffn.config.act_fn == "swish"
    assert stack.blocks[0].ffn.dropout.p == 0.25
    assert stack.blocks[0].xlstm.config.embedding_dim == 16


def test_copies_and_late_materialisation(model):
    x = tokens(2, 5)
    expected = model(x, return_state=False)
    assert torch.equal(copy.deepcopy(model)(x, return_state=False), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, return_state=False), expected)
    with torch.device("meta"):
        empty = build_model(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x, return_state=False), expected)


def test_backend_can_be_chosen():
    x = tokens(2, 5)
    model = build_model(xLSTMLargeConfig(16, 2, 1, 40))
    for backend in ("recurrent", "parallel", "chunkwise"):
        other = build_model(xLSTMLargeConfig(16, 2, 1, 40, ops_backend=backend))
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), model(x))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        xLSTMLargeConfig(16, 2, 1, 40, ops_backend="fast")


@pytest.mark.parametrize(
    ("backend", "step"), [("recurrent", "recurrent"), ("chunkwise", "auto"), ("auto", "auto")]
)
def test_steps_take_the_backend_that_was_asked_for(backend, step, monkeypatch):
    taken = []
    resolve = dispatch.resolve

    def spy(operator, name, request):
        if operator not in ("head_norm", "matmul"):
            taken.append((operator, name))
        return resolve(operator, name, request)

    monkeypatch.setattr(dispatch, "resolve", spy)
    rnn_backend = "scan" if backend == "chunkwise" else backend
    blocks = {
        "mlstm_block": mLSTMBlockConfig(mLSTMLayerConfig(ops_backend=backend)),
        "slstm_block": sLSTMBlockConfig(sLSTMLayerConfig(ops_backend=rnn_backend)),
    }
    for config in (
        xLSTMLargeConfig(16, 2, 1, 40, ops_backend=backend),
        xLSTMLMModelConfig(vocab_size=40, embedding_dim=16, num_blocks=2, slstm_at=[1], **blocks),
    ):
        build_model(config).step(tokens(2, 1))
    convolution = ("causal_convolution", "auto" if backend == "auto" else "portable")
    expected = [("mlstm_step", step), convolution, ("mlstm_step", step), convolution, ("rnn_step", step)]
    assert taken == expected


def test_reading_gives_the_state_of_forward(model):
    tokens = torch.randint(VOCABULARY, (2, 7))
    _, expected = model(tokens, return_state=True)
    for a, b in zip(leaves(model.read(tokens)), leaves(expected), strict=True):
        assert torch.equal(a, b)
