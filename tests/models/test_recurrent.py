"""xLSTM behaves like nn.LSTM: shapes, state round trip, packed sequences equal to running each alone."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import openxlstm.models.recurrent
from openxlstm.models import xLSTM
from openxlstm.state import leaves, select

BIDIRECTIONAL = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
CELL = pytest.mark.parametrize("cell", ["mlstm", "slstm", "mixed"])


def network(bidirectional=False, cell="mixed", **kwargs):
    model = xLSTM(6, 8, 2, bidirectional=bidirectional, batch_first=True, cell=cell, num_heads=2, **kwargs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_recurrent_kernel_" in name or "gate.weight" in name:
                p.normal_(std=0.3)  # zero at the start, so that the test would not see it
    return model.double()


@BIDIRECTIONAL
def test_shapes(bidirectional):
    features = 16 if bidirectional else 8
    x = torch.randn(3, 5, 6, dtype=torch.double)
    model = network(bidirectional)
    y, state = model(x)
    assert y.shape == (3, 5, features)
    assert state.batch_size == 3
    model.batch_first = False
    y_time_first, _ = model(x.transpose(0, 1))
    assert torch.equal(y_time_first.transpose(0, 1), y)
    y_unbatched, state = model(x[1])
    assert y_unbatched.shape == (5, features)
    assert state.batch_size == 1
    torch.testing.assert_close(y_unbatched, y[1])


@CELL
def test_state_round_trip(cell):
    x = torch.randn(2, 9, 6, dtype=torch.double)
    model = network(cell=cell)
    y, last = model(x)
    first, state = model(x[:, :4])
    second, state = model(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    for a, b in zip(leaves(state), leaves(last), strict=True):
        torch.testing.assert_close(a, b)


def test_both_directions_are_two_networks():
    x = torch.randn(2, 7, 6, dtype=torch.double)
    both = network(True)
    forward, backward = network(), network()
    for index, single in enumerate((forward, backward)):
        single.input_projections[0].load_state_dict(both.input_projections[index].state_dict())
        single.stacks[0].load_state_dict(both.stacks[index].state_dict())
    expected = torch.cat([forward(x)[0], backward(x.flip(1))[0].flip(1)], -1)
    torch.testing.assert_close(both(x)[0], expected)


@CELL
@BIDIRECTIONAL
@pytest.mark.parametrize("lengths", [(4,), (5, 3, 7, 3, 1), (2, 2, 2)], ids=str)
def test_packed_equals_each_alone(cell, bidirectional, lengths):
    model = network(bidirectional, cell)
    sequences = [torch.randn(n, 6, dtype=torch.double, requires_grad=True) for n in lengths]
    start = model(torch.randn(len(lengths), 3, 6, dtype=torch.double))[1].detach()
    weights = [torch.randn(n, 16 if bidirectional else 8, dtype=torch.double) for n in lengths]

    packed, state = model(pack_sequence(sequences, enforce_sorted=False), start)
    assert isinstance(packed, PackedSequence)
    padded, got_lengths = pad_packed_sequence(packed, batch_first=True)
    assert got_lengths.tolist() == list(lengths)
    loss = sum((y[:n] * w).sum() for y, w, n in zip(padded, weights, lengths, strict=True))
    loss = loss + sum(leaf.sum() for leaf in leaves(state))
    inputs = [*sequences, *model.parameters()]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)

    loss = torch.zeros((), dtype=torch.double)
    for row, (sequence, weight) in enumerate(zip(sequences, weights, strict=True)):
        y, alone = model(sequence, select(start, row))
        torch.testing.assert_close(padded[row, : len(sequence)], y)
        for a, b in zip(leaves(select(state, row)), leaves(alone), strict=True):
            torch.testing.assert_close(a, b)
        loss = loss + (y * weight).sum() + sum(leaf.sum() for leaf in leaves(alone))
    for a, b in zip(gradients, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@BIDIRECTIONAL
def test_sorted_packing_equals_unsorted(bidirectional):
    model = network(bidirectional)
    sequences = [torch.randn(n, 6, dtype=torch.double) for n in (5, 4, 4, 1)]
    first, state = model(pack_sequence(sequences))
    second, same_state = model(pack_sequence(sequences, enforce_sorted=False))
    assert torch.equal(first.data, second.data)
    assert first.sorted_indices is None
    for a, b in zip(leaves(state), leaves(same_state), strict=True):
        assert torch.equal(a, b)


def test_choices_and_heads():
    kinds = {
        cell: xLSTM(4, 8, 3, cell=cell).stacks[0].config.block_map for cell in ("mlstm", "slstm", "mixed")
    }
    assert kinds == {"mlstm": ["m", "m", "m"], "slstm": ["s", "s", "s"], "mixed": ["m", "s", "m"]}
    assert xLSTM(4, 8, 3, slstm_at=[0]).stacks[0].config.block_map == ["s", "m", "m"]
    assert xLSTM(4, 8, 2, slstm_at="[0:1]").stacks[0].config.block_map == ["s", "s"]
    y, _ = xLSTM(4, 6, cell="slstm")(torch.randn(3, 2, 4))  # 4 heads would not divide 6
    assert y.shape == (3, 2, 6)
    assert not any(
        "input_projections" in n and "bias" in n for n, _ in xLSTM(4, 8, bias=False).named_parameters()
    )


def test_same_generator_same_network():
    a, b = xLSTM(4, 8, 2), xLSTM(4, 8, 2)
    a.reset_parameters(torch.Generator().manual_seed(3))
    b.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def packed():
    return pack_sequence([torch.randn(n, 4) for n in (3, 2, 2)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xLSTM(0, 8), "input_size must be positive"),
        (lambda: xLSTM(4, 8, cell="gru"), "cell must be one of"),
        (lambda: xLSTM(4, 10, cell="slstm", num_heads=4), "does not divide"),
        (lambda: xLSTM(4, 8)(torch.randn(3, 2, 5)), "5 features, this xLSTM takes 4"),
        (lambda: xLSTM(4, 8)(torch.randn(4)), "2 dimensions"),
        (
            lambda: xLSTM(4, 8)(torch.randn(3, 2, 4), xLSTM(4, 8, 2).initial_state(2)),
            "model of 2 blocks, this one has 1",
        ),
        (lambda: xLSTM(4, 8)(torch.randn(3, 2, 4), xLSTM(4, 8).initial_state(5)), "holds 5 sequences"),
        (lambda: xLSTM(4, 8)(packed(), xLSTM(4, 8).initial_state(5)), "holds 5 sequences, the input 3"),
        (lambda: xLSTM(4, 8)(packed(), xLSTM(4, 8).initial_state(2)), "holds 2 sequences, the input 3"),
        (lambda: xLSTM(4, 8)(torch.randn(3, 2, 4), xLSTM(4, 64).initial_state(2)), "other cells or widths"),
        (lambda: xLSTM(4, 8)(packed(), xLSTM(4, 8, cell="slstm").initial_state(3)), "other cells or widths"),
        (
            lambda: xLSTM(4, 8)(torch.randn(3, 2, 4), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))),
            "must be a ModelState",
        ),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_docstring_example():
    results = doctest.testmod(openxlstm.models.recurrent, extraglobs={"torch": torch})
    assert results.attempted
    assert not results.failed
