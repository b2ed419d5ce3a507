"""The gate kernels against their definition in PyTorch, :mod:`openxlstm.ops.mlstm.gates`."""

from __future__ import annotations

import pytest
import torch
from cases import CASES

from openxlstm.ops.mlstm import gates, triton_scalars

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # older interpreters
]
NAMES = ["one_token", "wide_gates", "reset_and_forget", "sigmoid_reset"]


def problem(name, device, time=23):
    """(i, f, m0, reset), sigmoid."""
    case = CASES[name].but(time=min(time, CASES[name].time))
    with torch.device("cpu"):
        x = case.inputs(torch.float32)
        reset = case.reset()
        m0 = x.get("m0", torch.zeros(case.batch, case.heads))
    tensors = (x["i"], x["f"], m0)
    return (*(t.to(device) for t in tensors), reset if reset is None else reset.to(device)), (
        case.input_gate == "sigmoid"
    )


def anchored(expected: gates.Gates, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows and columns relative to the row where their segment begins."""
    starts = torch.nn.functional.pad(expected.segment, (1, -1), value=-1) != expected.segment
    begin = torch.where(starts, torch.arange(length), 0).cummax(-1).values
    anchor = expected.rows.gather(-1, begin)
    return expected.rows - anchor, expected.columns + anchor


@pytest.mark.parametrize("length", [5, 37])
@pytest.mark.parametrize("name", NAMES)
def test_scalars(name, length, device):
    arguments, sigmoid = problem(name, device)
    length = min(length, arguments[0].shape[1])
    expected = gates.prepare(*arguments, length, sigmoid)
    rows, columns = anchored(expected, length)
    first = triton_scalars.prepare(*arguments, length, sigmoid)
    again = triton_scalars.prepare(*arguments, length, sigmoid, first.m)
    for actual in (first, again):
        exact = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(actual.m, expected.m, **exact)
        torch.testing.assert_close(actual.rows, rows, **exact)
        torch.testing.assert_close(actual.columns, columns, **exact)
        assert torch.equal(actual.segment.long(), expected.segment)
        for one, two in (
            (actual.carry_in, expected.carry_in), (actual.to_state, expected.to_state),
            (actual.keep, expected.keep), (actual.floor, (-expected.m).exp()),
        ):  # fmt: skip
            torch.testing.assert_close(one, two.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("parts", [3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, parts, device, monkeypatch):
    """In blocks shorter than the sequence, so that sums cross from one to the next."""
    monkeypatch.setattr(triton_scalars, "MAX_CHUNK", 16)
    (i, f, m0, reset), sigmoid = problem(name, device)
    batch, time, heads = i.shape
    length = min(7, time)
    expected = gates.prepare(i, f, m0, reset, length, sigmoid)
    chunks = expected.keep.shape[-1]
    outgoing, incoming = (torch.randn(parts, batch, heads, chunks, length) for _ in range(2))
    for x in (outgoing, incoming):
        x.flatten(-2)[..., time:] = 0
    flow, along = torch.randn(batch, heads, chunks, 2), torch.randn(batch, heads, time)
    last_flow = torch.randn(batch, heads, dtype=torch.float64)
    dm_last, eps = torch.randn(batch, heads), 0.5
    flows = flow.double().sum(-1)
    into = incoming.double().sum(0)
    wanted = gates.gradients(
        expected, outgoing.double().sum(0) - into, torch.cat([flows[..., 1:], last_flow[..., None]], -1),
        flows[..., 0], into.flatten(-2)[..., :time], along.double() * -eps, dm_last.double() - last_flow,
        i, f, sigmoid,
    )  # fmt: skip
    actual = triton_scalars.gradients(
        i, f, m0, reset, expected.m, along, flow, outgoing, incoming, last_flow, dm_last, eps,
        sigmoid=sigmoid, normalize=True,
    )  # fmt: skip
    for one, two in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, two.float(), rtol=2e-6, atol=1e-6)
