"""AdamW over the model's groups: what is decayed, the norm, clipping, state by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from openxlstm.models import build_model
from openxlstm.training import TrainerConfig
from openxlstm.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)

SMALL = {"embedding_dim": 16, "num_blocks": 2, "vocab_size": 11}
MODELS: list[dict[str, Any]] = [
    {"model_type": "xlstm_lm", "slstm_at": [1], **SMALL},
    {"model_type": "xlstm_lm", "tie_weights": True, **SMALL},
    {"model_type": "xlstm_large", "num_heads": 2, **SMALL},
]


@pytest.mark.parametrize("fields", MODELS)
def test_groups_cover_the_model_once(fields: dict[str, Any]) -> None:
    model = build_model(fields)
    optimizer = build_optimizer(model, TrainerConfig(weight_decay=0.3, eps=1e-5, betas=(0.8, 0.9)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    kept = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {"token_embedding.weight", "embedding.weight"} & kept
    assert all(group["eps"] == 1e-5 and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_a_forgotten_parameter_is_named() -> None:
    class Forgetful(nn.Linear):
        def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
            return [{"params": [self.weight], "weight_decay": weight_decay}]

    with pytest.raises(ValueError, match="Forgetful leave out 'bias'"):
        build_optimizer(Forgetful(2, 2), TrainerConfig())


def test_norm_and_clipping() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(3))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = float(gradient_norm([first, second, unused]))
    assert norm == 5.0
    clip_gradients([first, second, unused], norm, 10.0)
    clip_gradients([first, second, unused], norm, 0.0)
    assert first.grad.tolist() == [3.0, 0.0]
    clip_gradients([first, second, unused], norm, 0.5)
    assert float(gradient_norm([first, second])) == pytest.approx(0.5)


def test_state_by_name_goes_round_and_refuses_other_shapes() -> None:
    torch.manual_seed(0)
    fields = MODELS[0]
    model, config = build_model(fields), TrainerConfig()
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert {name.split("/")[0] for name in saved} == {"exp_avg", "exp_avg_sq", "step"}

    other = build_model(fields)
    other.load_state_dict(model.state_dict())
    restored = build_optimizer(other, config)
    load_optimizer_tensors(other, restored, saved)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    optimizer.step()
    restored.step()
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)

    with pytest.raises(ValueError, match="has shape"):
        load_optimizer_tensors(build_model({**fields, "embedding_dim": 32}), restored, saved)
    with pytest.raises(ValueError, match="which the model does not have"):
        load_optimizer_tensors(build_model(MODELS[2]), restored, saved)


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(build_model(MODELS[0]), TrainerConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * len(optimizer.param_groups)
    assert math.isclose(optimizer.param_groups[0]["weight_decay"], 0.1)
