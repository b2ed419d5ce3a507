"""What mlstm refuses, and what it says."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from openxlstm.ops import (
    dispatch,
    explain,
    mlstm,
    mlstm_initial_state,
    mlstm_step,
    reset_from_cu_seqlens,
    reset_from_document_ids,
)
from openxlstm.ops.packing import length_groups
from openxlstm.state import mLSTMState


def call(**changes):
    x = Case(time=4).inputs(torch.float32)
    options = {name: changes.pop(name) for name in list(changes) if name not in x}
    x.update(changes)
    return mlstm(*(x[n] for n in "qkvif"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 4, 2, 9)}, "k must have the shape of q"),
        ({"v": torch.zeros(2, 5, 2, 8)}, "v must have shape"),
        ({"i": torch.zeros(2, 4)}, r"i must have shape \(B, T, H\) = \(2, 4, 2\)"),
        ({"f": torch.zeros(2, 4, 2, dtype=torch.int64)}, "f must be a floating-point tensor"),
        ({"v": torch.zeros(2, 4, 2, 8, dtype=torch.float64)}, "must share a dtype"),
        ({"q": torch.zeros(2, 4, 8)}, r"q must have shape \(B, T, H, DK\)"),
        ({"input_gate": "tanh"}, "'exp' or 'sigmoid'"),
        ({"normalize": False}, "needs input_gate='sigmoid'"),
        ({"chunk_size": 0}, "chunk_size must be positive"),
        ({"backend": "chunkwize"}, "Did you mean 'chunkwise'"),
        ({"reset": torch.zeros(2, 5, dtype=torch.bool)}, "reset must be bool"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "batch must be 1"),
        ({"state": mLSTMState(*(torch.zeros(1) for _ in range(3)))}, "state.c must have shape"),
        ({"state": (torch.zeros(1), torch.zeros(1))}, "must be an mLSTMState"),
        ({"state": mlstm_initial_state(2, 2, 8, 12, device="meta")}, "state.c is on meta, q on cpu"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool, device="meta")}, "reset is on meta"),
        ({"q": torch.zeros(2, 4, 2, 0), "k": torch.zeros(2, 4, 2, 0)}, "must be at least 1"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("offsets", [[0, 3], [1, 4], [0, 3, 2, 4]])
def test_bad_offsets(offsets):
    x = Case(batch=1, time=4).inputs(torch.float32)
    with pytest.raises(ValueError, match="must rise from 0 to T = 4"):
        mlstm(*(x[n] for n in "qkvif"), cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def test_boundaries_once():
    x = Case(batch=1, time=4).inputs(torch.float32)
    with pytest.raises(ValueError, match="not both"):
        mlstm(
            *(x[n] for n in "qkvif"),
            cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
            reset=torch.zeros(1, 4, dtype=torch.bool),
        )


def test_step_shapes():
    x = Case(time=4).inputs(torch.float32)
    with pytest.raises(ValueError, match="one token"):
        mlstm_step(*(x[n] for n in "qkvif"), mLSTMState(x["q"], x["q"], x["q"]))


def test_explain_names_the_choice():
    text = explain("mlstm", dtype=torch.float64)
    assert "mlstm/chunkwise: chosen by 'auto'" in text
    assert "mlstm/native: cannot: computes in float32, not float64" in text
    assert "mlstm/recurrent: can, when asked for by name" in text
    with pytest.raises(ValueError, match="Did you mean 'mlstm'"):
        explain("mlstmm")


def test_refusals_are_reported():
    request = dispatch.Request(torch.device("cpu"), torch.float32)
    dispatch.register(
        "test_op", "never", lambda: None, priority=5, refuse=lambda r: f"needs a GPU, not {r.device}"
    )
    with pytest.raises(ValueError, match="'never' of test_op cannot serve this call: needs a GPU, not cpu"):
        dispatch.resolve("test_op", "never", request)
    with pytest.raises(ValueError, match="no backend of test_op can serve"):
        dispatch.resolve("test_op", "auto", request)


def test_boundary_conversions():
    ids = torch.tensor([[4, 4, 7, 7, 7, 4]])
    assert reset_from_document_ids(ids).tolist() == [[False, False, True, False, False, True]]
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    assert reset_from_cu_seqlens(offsets, 6).tolist() == [[True, False, True, False, False, True]]


def test_length_groups_cover_everything_once():
    lengths = torch.tensor([3, 0, 1, 100, 64, 65, 2, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    seen, documents = [], []
    for group, positions, valid in length_groups(offsets):
        assert valid.numel() <= 2 * max(int(valid.sum()), 1) or int(valid.sum()) == 0
        seen += positions[valid].tolist()
        documents += group.tolist()
    assert sorted(seen) == list(range(int(lengths.sum())))
    assert sorted(documents) == list(range(8))
