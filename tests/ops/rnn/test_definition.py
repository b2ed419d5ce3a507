"""The definition: against published vectors, PyTorch's own networks, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openxlstm.ops.rnn import rnn, rnn_initial_state, rnn_step
from openxlstm.state import sLSTMState

BACKENDS = ["recurrent", "scan"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", ["slstm_cell_s11", "slstm_cell_init_s6"])
def test_slstm_matches_the_published_cell(golden, rel_error, name, dtype, tolerance, backend):
    description, tensors = golden(name)
    batch, time, heads = description["B"], description["S"], description["num_heads"]
    d = description["hidden_size"] // heads
    x = tensors["in.x_BS_GNH"].to(dtype).view(batch, time, 4, heads, d).requires_grad_()
    weight = tensors["param._recurrent_kernel_"].to(dtype).view(heads, 4, d, d).transpose(0, 1)
    weight = weight.detach().requires_grad_()
    bias = tensors["param._bias_"].to(dtype).view(4, heads, d).requires_grad_()
    state = None
    if "in.state" in tensors:
        state = sLSTMState(*tensors["in.state"].to(dtype).view(4, batch, heads, d))
    h, last = rnn("slstm", x, weight, bias, state=state, return_state=True, backend=backend)
    (h.transpose(1, 2) * tensors["in.loss_weight"]).sum().backward()

    prefix = "f64" if dtype == torch.float64 else "f32"
    assert rel_error(h.transpose(1, 2), tensors[f"{prefix}.y_BNSH"]) < tolerance
    assert rel_error(torch.stack(last).flatten(2), tensors[f"{prefix}.state"]) < tolerance
    assert rel_error(x.grad.flatten(2), tensors[f"{prefix}.grad.x"]) < tolerance
    assert rel_error(bias.grad.flatten(), tensors[f"{prefix}.grad._bias_"]) < tolerance
    weight_gradient = weight.grad.transpose(0, 1).flatten(1, 2)
    assert rel_error(weight_gradient, tensors[f"{prefix}.grad._recurrent_kernel_"]) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_one_head_is_pytorch(cell, backend):
    d, time = 5, 7
    kind, order = {
        "lstm": (nn.LSTM, (0, 1, 2, 3)),  # both orders are input, forget, cell, output
        "gru": (nn.GRU, (2, 0, 1)),  # theirs is r, z, n; ours g (their recurrent n), r, z
        "elman": (nn.RNN, (0,)),
    }[cell]
    theirs = kind(3, d, batch_first=True, dtype=torch.float64)
    inputs = torch.randn(2, time, 3, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in theirs.parameters())
    recurrent = w_hh.view(-1, d, d)[list(order)].unsqueeze(1)
    if cell == "gru":
        b_i, b_h = b_ih.view(3, d), b_hh.view(3, d)
        bias = torch.stack((b_h[2], b_i[0] + b_h[0], b_i[1] + b_h[1], b_i[2])).unsqueeze(1)
    else:
        bias = (b_ih + b_hh).view(-1, 1, d)
    x = (inputs @ w_ih.T).view(2, time, -1, 1, d)
    expected, _ = theirs(inputs)
    h = rnn(cell, x, recurrent, bias, backend=backend)
    torch.testing.assert_close(h.squeeze(2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_input_match_finite_differences(make_case, cell_and_floor, backend):
    cell, floor = cell_and_floor
    case = make_case(cell, (2, 3, 2, 2), floor=floor)
    inputs = [t.clone().requires_grad_() for t in case.tensors()]
    reset = torch.tensor([[False, False, False], [False, True, False]])
    for options in ({}, {"reset": reset}):
        torch.autograd.gradcheck(
            lambda *t, options=options: case.run(*t, backend=backend, **options), inputs, atol=1e-7
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_from_the_empty_state_match_finite_differences(make_case, backend):
    case = make_case("slstm", (1, 3, 2, 2), empty=True)
    parameters = [t.clone().requires_grad_() for t in case.tensors()[:3]]
    torch.autograd.gradcheck(lambda *t: case.run(*t, *case.state, backend=backend), parameters, atol=1e-7)


def test_the_definition_is_twice_differentiable(make_case, cell_and_floor):
    cell, floor = cell_and_floor
    case = make_case(cell, (1, 2, 1, 2), floor=floor)
    inputs = [t.clone().requires_grad_() for t in case.tensors()]
    torch.autograd.gradgradcheck(lambda *t: case.run(*t, backend="recurrent"), inputs, atol=1e-6)


def test_steps_make_the_sequence(make_case, cell_and_floor):
    cell, floor = cell_and_floor
    case = make_case(cell, floor=floor)
    h, *last = case.run()
    state = case.state
    for t in range(case.x.shape[1]):
        before = [leaf.clone() for leaf in state]
        out, new = rnn_step(cell, case.x[:, t], case.weight, case.bias, state, normalizer_floor=floor)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        torch.testing.assert_close(out, h[:, t], rtol=1e-12, atol=1e-12)
        state = new
    torch.testing.assert_close(list(state), last, rtol=1e-12, atol=1e-12)


def test_initial_state_is_empty_and_typed():
    state = rnn_initial_state("slstm", 2, 3, 4)
    assert isinstance(state, sLSTMState)
    assert all(s.shape == (2, 3, 4) and s.dtype == torch.float32 and not s.any() for s in state)
    assert rnn_initial_state("gru", 1, 1, 1, dtype=torch.float64).h.dtype == torch.float64


def test_the_floor_is_inactive_after_the_empty_state(make_case):
    case = make_case("slstm", empty=True)
    plain, floored = case.run(), case._replace(floor=1.0).run()
    assert all(torch.equal(a, b) for a, b in zip(plain, floored, strict=True))
    assert (plain[3] >= 1).all()


def test_the_floor_acts_on_small_normalizers(make_case):
    case = make_case("slstm", (1, 1, 1, 2))
    case = case._replace(x=torch.full_like(case.x, -20.0))  # the input gate adds next to nothing
    case.x[:, :, 1] = 20.0  # and the forget gate keeps all
    state = case.state._replace(h=torch.zeros_like(case.state.h), n=torch.full_like(case.state.n, 0.25))
    small, floored = case._replace(state=state), case._replace(state=state, floor=1.0)
    torch.testing.assert_close(small.run()[3], state.n, rtol=1e-3, atol=0)
    assert (floored.run()[3] == 1).all()
