"""The sLSTM layer against the published code: outputs, states, steps, any split, both weight layouts."""

from __future__ import annotations

import pytest
import torch

from openxlstm.layers import sLSTMLayer, sLSTMLayerConfig

CASE = "slstm_layer_s10"
TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-4}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def case(request, golden):
    description, tensors = golden(CASE)
    layer = sLSTMLayer(
        sLSTMLayerConfig(
            embedding_dim=description["embedding_dim"],
            num_heads=description["num_heads"],
            conv1d_kernel_size=description["conv1d_kernel_size"],
        )
    )
    layer.load_state_dict({k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")})
    prefix = "f64." if request.param == torch.float64 else "f32."
    expected = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return layer.to(request.param), tensors["in.x"].to(request.param), expected, TOLERANCE[request.param]


def published_cell_state(cell):
    return torch.stack([part.flatten(1) for part in cell])  # (4, B, H D)


def test_sequence(case, rel_error):
    layer, x, expected, tolerance = case
    y, state = layer(x, return_state=True)
    assert rel_error(y, expected["y"]) < tolerance
    assert rel_error(state.conv, expected["conv_state_forward"]) < tolerance
    assert rel_error(published_cell_state(state.cell), expected["slstm_state"]) < tolerance
    assert torch.equal(layer(x), y)


def test_steps(case, rel_error):
    layer, x, expected, tolerance = case
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        outputs.append(y)
    assert rel_error(torch.cat(outputs, 1), expected["y_step"]) < tolerance
    # The published step form keeps four rows of inputs, of which the convolution still needs three.
    assert rel_error(state.conv, expected["conv_state_step"][:, 1:]) < tolerance
    assert rel_error(published_cell_state(state.cell), expected["slstm_state_step"]) < tolerance


@pytest.mark.parametrize("split", range(11))
def test_any_split(case, rel_error, split):
    layer, x, expected, tolerance = case
    first, state = layer(x[:, :split], return_state=True)
    second = layer(x[:, split:], state)
    assert rel_error(torch.cat([first, second], 1), expected["y_split"]) < tolerance


def test_cuda_layout_loads(case):
    layer, x, _, _ = case
    weights = layer.state_dict()
    heads, dim = layer.slstm_cell.num_heads, layer.slstm_cell.head_dim
    kernel, bias = weights["slstm_cell._recurrent_kernel_"], weights["slstm_cell._bias_"]
    weights["slstm_cell._recurrent_kernel_"] = kernel.transpose(1, 2).contiguous()
    weights["slstm_cell._bias_"] = bias.view(4, heads, dim).transpose(0, 1).reshape(-1)
    other = sLSTMLayer(layer.config).to(x.dtype)
    other.load_state_dict(weights)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.slstm_cell._bias_, bias)
