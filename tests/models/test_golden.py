"""Stacks and language models against the published code: outputs, states, steps, gradients, key names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openxlstm.config import config_from_dict
from openxlstm.models import (
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLarge,
    xLSTMLargeConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)

VALUES = {torch.float64: 2e-6, torch.float32: 3e-4}
GRADIENTS = {torch.float64: 2e-6, torch.float32: 3e-3}


def with_prefix(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stack_fields(description):
    """The fields of a block stack in a case's description, as a configuration file would hold them."""
    fields = {name: description[name] for name in ("embedding_dim", "num_blocks")}
    fields |= {name: description[name] for name in ("bias", "context_length") if name in description}
    fields["slstm_at"] = description["slstm_at"] or []
    if "mlstm" in description:
        slstm = dict(description["slstm"])
        feedforward = {"proj_factor": slstm.pop("ffn_proj_factor"), "act_fn": slstm.pop("act")}
        fields["mlstm_block"] = {"mlstm": description["mlstm"]}
        fields["slstm_block"] = {"slstm": slstm, "feedforward": feedforward}
    return fields


def check_gradients(model, expected, tolerance, rel_error):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # Gradients that are nothing but rounding noise (such as that of an input gate's bias under a norm)
        # have no meaningful relative error.
        scale = max(g.double().norm() for g in expected.values())
        if expected[name].double().norm() > 1e-6 * scale:
            assert rel_error(gradient, expected[name]) < tolerance, name


def check_published_state(state, tensors, rel_error, tolerance):
    """Against the published step states: C and n hold scaled keys, convolutions one row too many."""
    for index, (conv, cell) in enumerate(state.blocks):
        block = with_prefix(tensors, f"step_state.block_{index}.")
        assert rel_error(conv, block["conv_state.0"][:, 1:]) < tolerance
        if hasattr(cell, "h"):
            actual = torch.stack([part.flatten(1) for part in cell])
            assert rel_error(actual, block["slstm_state"]) < tolerance
        else:
            root = cell.c.shape[-1] ** 0.5
            assert rel_error(cell.c / root, block["mlstm_state.0"]) < tolerance
            assert rel_error(cell.n / root, block["mlstm_state.1"][..., 0]) < tolerance
            assert rel_error(cell.m, block["mlstm_state.2"][..., 0, 0]) < tolerance


def run_steps(model, x):
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = model.step(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", ["block_stack_mixed_e32", "block_stack_mlstm_bias_e32"])
def test_block_stack(golden, rel_error, name, dtype):
    description, tensors = golden(name)
    stack = xLSTMBlockStack(config_from_dict(xLSTMBlockStackConfig, stack_fields(description)))
    stack.load_state_dict(with_prefix(tensors, "param."))
    stack = stack.to(dtype)
    x = tensors["in.x"].to(dtype)
    expected = with_prefix(tensors, "f64." if dtype == torch.float64 else "f32.")

    y, state = stack(x, return_state=True)
    assert rel_error(y, expected["y"]) < VALUES[dtype]
    check_published_state(state, with_prefix(tensors, "f32."), rel_error, VALUES[torch.float32])
    (y * tensors["in.loss_weight"]).sum().backward()
    check_gradients(stack, with_prefix(tensors, "f32.grad."), GRADIENTS[torch.float32], rel_error)

    with torch.no_grad():
        y, state = run_steps(stack, x)
    assert rel_error(y, expected["y_step"]) < VALUES[dtype]
    check_published_state(state, with_prefix(tensors, "f32."), rel_error, VALUES[torch.float32])


def lm_model(description, tensors, **changes):
    fields = stack_fields(description) | {
        name: description[name] for name in ("vocab_size", "tie_weights", "weight_decay_on_embedding")
    }
    model = xLSTMLMModel(config_from_dict(xLSTMLMModelConfig, fields | changes))
    model.load_state_dict(with_prefix(tensors, "param."))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_lm_model(golden, rel_error, dtype):
    description, tensors = golden("lm_mixed_e32_v40")
    model = lm_model(description, tensors).to(dtype)
    tokens = tensors["in.idx"]
    expected = with_prefix(tensors, "f64." if dtype == torch.float64 else "f32.")

    logits = model(tokens[:, :-1])
    assert rel_error(logits, expected["logits"]) < VALUES[dtype]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert rel_error(loss, tensors["f32.loss"]) < VALUES[torch.float32]
    loss.backward()
    check_gradients(model, with_prefix(tensors, "f32.grad."), GRADIENTS[torch.float32], rel_error)

    with torch.no_grad():
        logits, _ = run_steps(model, tokens[:, :-1])
    assert rel_error(logits, tensors["f32.logits_step"]) < VALUES[torch.float32]


def test_lm_model_names_and_weight_decay(golden):
    description, tensors = golden("lm_mixed_e32_v40")
    model = lm_model(description, tensors)
    assert list(model.state_dict()) == description["state_dict_keys"]
    decay, no_decay = model.weight_decay_split()
    assert sorted(decay) == sorted(description["weight_decay"])
    assert sorted(no_decay) == sorted(description["no_weight_decay"])

    decay, no_decay = lm_model(description, tensors, weight_decay_on_embedding=True).weight_decay_split()
    assert sorted(decay) == sorted([*description["weight_decay"], "token_embedding.weight"])
    groups = model.parameter_groups(0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("name", ["large_e64_h2_b2", "large_bias_qk1_e32"])
def test_large(golden, rel_error, name, weight_mode):
    description, tensors = golden(name)
    config = config_from_dict(xLSTMLargeConfig, description["config"] | {"weight_mode": weight_mode})
    model = xLSTMLarge(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == description[f"{weight_mode}_keys"]
    model.load_state_dict(with_prefix(tensors, "param."))  # single weights load into both modes
    tokens, expected = tensors["in.idx"], with_prefix(tensors, "f32.")
    length = expected["logits"].shape[1]

    logits, state = model(tokens[:, :length])  # the case's configuration asks for the state
    assert rel_error(logits, expected["logits"]) < VALUES[torch.float32]
    assert rel_error(logits, expected["logits_fused"]) < VALUES[torch.float32]
    for index, cell in enumerate(state.blocks):
        for part in ("c", "n", "m"):
            actual = getattr(cell, part)
            published = expected[f"state.{index}.{part}"].reshape(actual.shape)
            assert rel_error(actual, published) < VALUES[torch.float32]

    with torch.no_grad():
        stepped, _ = run_steps(model, tokens[:, :length])
    assert rel_error(stepped, expected["logits_step"]) < VALUES[torch.float32]

    train = description["train_seq_len"]
    logits = model(tokens[:, :train], return_state=False)
    assert rel_error(logits, expected["train_logits"]) < VALUES[torch.float32]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 : train + 1].flatten())
    assert rel_error(loss, expected["train_loss"]) < VALUES[torch.float32]
    loss.backward()
    if weight_mode == "single":
        check_gradients(model, with_prefix(expected, "train_grad."), GRADIENTS[torch.float32], rel_error)


@pytest.mark.parametrize("name", ["large_e64_h2_b2", "large_bias_qk1_e32"])
def test_large_fused_weights_load_into_single(golden, name):
    description, tensors = golden(name)
    config = config_from_dict(xLSTMLargeConfig, description["config"] | {"weight_mode": "fused"})
    fused = xLSTMLarge(config)
    fused.load_state_dict(with_prefix(tensors, "param."))
    single = xLSTMLarge(config_from_dict(xLSTMLargeConfig, description["config"]))
    single.load_state_dict(fused.state_dict())
    for key, value in single.state_dict().items():
        assert torch.equal(value, tensors[f"param.{key}"])


@pytest.mark.parametrize("name", ["large_e64_h2_b2", "large_bias_qk1_e32"])
def test_large_greedy(golden, name):
    description, tensors = golden(name)
    model = xLSTMLarge(config_from_dict(xLSTMLargeConfig, description["config"]))
    model.load_state_dict(with_prefix(tensors, "param."))
    assert torch.equal(
        greedy(model, tensors["in.idx"][:, :5], 8), tensors["f32.generate_from_first5_greedy8"]
    )


@torch.no_grad()
def greedy(model, prompt, count):
    """``count`` new tokens, the most likely one each time."""
    logits, state = model(prompt, return_state=True)
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < count:
        logits, state = model.step(tokens[-1], state)
        tokens.append(logits.argmax(-1))
    return torch.cat(tokens, 1)


HF_FIELDS = ("embedding_dim", "num_heads", "num_blocks", "vocab_size", "qk_dim_factor", "ffn_proj_factor")


def test_hugging_face(golden, rel_error):
    description, tensors = golden("hf_causal_e64_h2_b2")
    config = config_from_dict(xLSTMLargeConfig, {name: description["config"][name] for name in HF_FIELDS})
    model = xLSTMLarge(config)
    weights = with_prefix(tensors, "param.")
    weights["embedding.weight"] = weights.pop("backbone.embeddings.weight")
    model.load_state_dict(weights)
    tokens, expected = tensors["in.idx"], with_prefix(tensors, "f32.")

    logits, state = model(tokens, return_state=True)
    assert rel_error(logits, expected["logits"]) < VALUES[torch.float32]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert rel_error(loss, expected["loss"]) < VALUES[torch.float32]
    for index, cell in enumerate(state.blocks):
        for part in ("c", "n", "m"):
            actual = getattr(cell, part)
            published = expected[f"cache.{index}.{part}"].reshape(actual.shape)
            assert rel_error(actual, published) < VALUES[torch.float32]
    with torch.no_grad():
        hidden, _ = model.backbone(model.embedding(tokens), None)
        stepped, _ = run_steps(model, tokens)
    assert rel_error(hidden, expected["hidden_after_out_norm"]) < VALUES[torch.float32]
    assert rel_error(stepped, expected["logits_step"]) < VALUES[torch.float32]
    generated = torch.cat([tokens[:, :6], greedy(model, tokens[:, :6], 8)], 1)
    assert torch.equal(generated, expected["generate_greedy8_from_first6"])
