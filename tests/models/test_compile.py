"""Models under torch.compile(fullgraph=True) and torch.export, values and gradients."""

from __future__ import annotations

import pytest
import torch

from openxlstm.models import build_model, xLSTM, xLSTMLargeConfig, xLSTMLMModelConfig
from openxlstm.state import leaves

CONFIGS = {
    "mixed": xLSTMLMModelConfig(vocab_size=40, embedding_dim=16, num_blocks=2, slstm_at=[1]),
    "large": xLSTMLargeConfig(16, 2, 1, 40),
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.compiler.reset()
    return build_model(CONFIGS[request.param])


def compiled(model):
    """Whole graph, forward and backward traced through every custom op; no C++ compiler needed."""
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_compile_sequence(model):
    x = torch.randint(40, (2, 9))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = True
    expected, state = model(x, reset=reset, return_state=True)
    logits, new_state = compiled(model)(x, reset=reset, return_state=True)
    torch.testing.assert_close(logits, expected)
    for a, b in zip(leaves(new_state), leaves(state), strict=True):
        torch.testing.assert_close(a, b)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compile_step(model):
    x = torch.randint(40, (2, 5))
    _, state = model(x, return_state=True)
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    expected, _ = model.step(x[:, :1], state)
    torch.testing.assert_close(step(x[:, :1], state)[0], expected)


class Step(torch.nn.Module):
    """One decoding step as a module, for export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, state):
        return self.model.step(tokens, state)


@torch.no_grad()
def test_export_step(model):
    x, state = torch.randint(40, (2, 2)), model.initial_state(2)
    program = torch.export.export(Step(model), (x[:, :1], state)).module()
    for t in range(2):
        expected, expected_state = model.step(x[:, t : t + 1], state)
        logits, state = program(x[:, t : t + 1], state)
        torch.testing.assert_close(logits, expected)
        for a, b in zip(leaves(state), leaves(expected_state), strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(model, dynamic):
    x = torch.randint(40, (2, 9))
    shapes = ({1: torch.export.Dim("time", min=2, max=4096)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(x), model(x))
    if dynamic:
        x = torch.randint(40, (2, 150))
        torch.testing.assert_close(program(x), model(x))


def test_compile_xlstm_module():
    torch.compiler.reset()
    lstm = xLSTM(4, 8, bidirectional=True)
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(compiled(lstm)(x)[0], lstm(x)[0])
