"""The causal convolution: bad arguments, and the portable backend's higher derivatives."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops import causal_convolution


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((2, 5), (3, 4)), {}, r"x must be floating point of shape \(B, T, E\), got torch.float32 \(2, 5\)"),
        (((2, 5, 3), (4, 4)), {}, r"weight must have shape \(E, K\) = \(3, 1 or more\), got \(4, 4\)"),
        (((2, 5, 3), (3, 0)), {}, r"weight must have shape"),
        (((2, 5, 3), (3, 4), (4,)), {}, r"bias must have shape \(3,\), got \(4,\)"),
        (((2, 5, 3), (3, 4)), {"state": torch.zeros(2, 4, 3)}, r"state must have shape \(2, 3, 3\)"),
        (((2, 5, 3), (3, 4)), {"reset": torch.zeros(2, 5)}, "reset must be bool"),
        (((2, 5, 3), (3, 4)), {"backend": "nativ"}, "unknown backend 'nativ'.*'native'"),
        (((2, 5, 3), (3, 4)), {"state": torch.zeros(2, 3, 3, device="meta")}, "state is on meta, x on cpu"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        causal_convolution(*(torch.zeros(shape) for shape in arguments), **options)


def test_the_portable_backend_differentiates_twice():
    x, weight, state = (torch.randn(*s, dtype=torch.double) for s in ((2, 4, 3), (3, 3), (2, 2, 3)))
    inputs = [t.requires_grad_() for t in (x, weight, state)]
    reset = torch.tensor([[False, False, True, False], [False] * 4])

    def function(x, weight, state):
        return causal_convolution(x, weight, state=state, return_state=True, reset=reset, silu=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
