"""The causal convolution: bad arguments, higher derivatives of the portable backend, the Triton backend."""

from __future__ import annotations

import pytest
import torch

from openxlstm.ops import causal_convolution, explain


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


# --- Triton, on a GPU or in the interpreter ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 4), (2, 21, 3, 4), (1, 35, 130, 2), (3, 2, 4, 9), (1, 4, 3, 1), (2, 0, 3, 4)], ids=str
)
def test_triton_equals_the_definition(shape, with_reset, device, rel_error):
    batch, time, channels, taps = shape
    x, weight = torch.randn(batch, time, 2 * channels)[..., channels:], torch.randn(channels, taps)
    bias, state = None if with_reset else torch.randn(channels), torch.randn(batch, taps - 1, channels)
    options = {"return_state": True, "silu": True}
    if with_reset:
        options["reset"] = torch.rand(batch, time) < 0.3
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)):
        given = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
        exact = [None if t is None else t.double() for t in given]
        before = state.to(dtype).float()
        y, last = causal_convolution(*given, state=before, backend="triton", **options)
        wanted, wanted_last = causal_convolution(*exact, state=before.double(), backend="portable", **options)
        assert y.dtype == dtype
        assert last.dtype == torch.float32
        assert rel_error(y, wanted) < tolerance
        assert rel_error(last, wanted_last) < 1e-7


def test_triton_refuses_and_compiles(device):
    x, weight = torch.randn(1, 3, 4), torch.randn(4, 3)
    assert "causal_convolution/triton: chosen by 'auto'" in explain("causal_convolution", device="cuda")
    assert "has no backward pass" in explain("causal_convolution", device="cuda", needs_grad=True)
    with pytest.raises(ValueError, match="has no backward pass"):
        causal_convolution(x, weight.clone().requires_grad_(), backend="triton")
    with pytest.raises(ValueError, match="up to 32 taps, got 33"):
        causal_convolution(x, torch.zeros(4, 33), backend="triton")
    arguments = (x, weight, None, torch.randn(1, 2, 4), torch.rand(1, 3) < 0.5, True)
    torch.library.opcheck(
        torch.ops.openxlstm.causal_convolution_triton.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip
    compiled = torch.compile(causal_convolution, fullgraph=True, backend="aot_eager")
    expected = causal_convolution(x, weight, backend="triton")
    torch.testing.assert_close(compiled(x, weight, backend="triton"), expected)
