"""Bad arguments are refused with a sentence that names the value and the fix."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops.dispatch import explain
from openxlstm.ops.rnn import rnn, rnn_initial_state, rnn_step

X = torch.zeros(2, 3, 4, 2, 5)
W = torch.zeros(4, 2, 5, 5)
B = torch.zeros(4, 2, 5)


def state(**options):
    return rnn_initial_state("slstm", 2, 2, 5, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("slsm", X, W), {}, r"unknown cell 'slsm'.*slstm"),
        (("slstm", X[0], W), {}, r"x must have shape \(B, T, G, H, D\), got \(3, 4, 2, 5\)"),
        (("gru", X, W), {}, r"x of cell 'gru' must have 3 gates \(r, z, n\).*got 4"),
        (
            ("slstm", X, W[:3]),
            {},
            r"weight of cell 'slstm' must have shape \(4, 2, 5, 5\).*got \(3, 2, 5, 5\)",
        ),
        (("slstm", X, W, B[:, :1]), {}, r"bias of cell 'slstm' must have shape \(4, 2, 5\).*got \(4, 1, 5\)"),
        (("gru", X[:, :, :3], W[:3], B[:3]), {}, r"bias of cell 'gru' .*g, r, z, n.*got \(3, 2, 5\)"),
        (("slstm", X.int(), W), {}, r"x must be a floating-point tensor, got torch.int32"),
        (("slstm", X, W.long()), {}, r"weight must be a floating-point tensor"),
        (("slstm", X.to("meta"), W), {}, r"weight is on cpu, x on meta"),
        (("slstm", X[..., :0], W[..., :0, :0]), {}, r"at least one head of at least one dimension"),
        (("slstm", X, W), {"backend": "skan"}, r"unknown backend 'skan'.*scan"),
        (("slstm", X, W), {"state": state(dtype=torch.float64)}, r"state.h must be torch.float32"),
        (("slstm", X, W), {"state": state()[:2]}, r"sLSTMState\(h, c, n, m\), got 2 tensors"),
        (("slstm", X[:1], W), {"state": state()}, r"state.h must have shape .*\(1, 2, 5\), got \(2, 2, 5\)"),
        (("lstm", X, W), {"normalizer_floor": 1.0}, r"normalizer_floor belongs to cell 'slstm'"),
        (("slstm", X, W), {"normalizer_floor": -1.0}, r"normalizer_floor must be None or a positive number"),
        (("slstm", X, W), {"reset": torch.zeros(2, 3)}, r"reset must be bool"),
        (("slstm", X, W), {"cu_seqlens": torch.tensor([0, 3])}, r"batch must be 1"),
        (("slstm", X[:1], W), {"cu_seqlens": torch.tensor([0, 2])}, r"cu_seqlens must rise from 0 to T = 3"),
        (
            ("slstm", X[:1], W),
            {"cu_seqlens": torch.tensor([0, 3]), "reset": torch.zeros(1, 3, dtype=torch.bool)},
            r"either cu_seqlens or reset",
        ),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rnn(*arguments, **options)


def test_bad_steps():
    with pytest.raises(ValueError, match=r"\(B, G, H, D\) for one position"):
        rnn_step("slstm", X, W, B, state())
    with pytest.raises(ValueError, match=r"state.h must have shape"):
        rnn_step("slstm", X[:1, 0], W, B, state())
    with pytest.raises(ValueError, match="unknown backend"):
        rnn_step("slstm", X[:, 0], W, B, state(), backend="scan")
    with pytest.raises(ValueError, match="unknown cell"):
        rnn_initial_state("mlstm", 1, 1, 1)


def test_the_choice_is_visible(monkeypatch):
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    assert "rnn/scan: chosen by 'auto'" in explain("rnn")
    assert "rnn/recurrent: can, when asked for by name" in explain("rnn")
