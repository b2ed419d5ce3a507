"""The Triton backend of the recurrent operator against the float64 definition: fused and alternating.

On a GPU if there is one, else in Triton's interpreter. Tensors that a kernel is to fill start as NaN.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from openxlstm.ops import explain, rnn_step
from openxlstm.ops.gpu import configurations
from openxlstm.ops.rnn.cells import CELLS

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # older interpreters
]
cells = pytest.mark.parametrize("cell", list(CELLS))


@pytest.fixture(params=["fused", "alternating"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run, whatever the head dimension."""
    limit = 128 if request.param == "fused" else 0
    monkeypatch.setattr(configurations, "fused_head_dim", lambda device, dtype: limit)
    return request.param


@pytest.fixture
def case_on(make_case, device):
    """A case of float32 inputs on the device under test."""

    def make(*arguments, dtype=torch.float32, **options):
        with torch.device("cpu"):
            case = make_case(*arguments, dtype=dtype, **options)
        moved = [t.to(device) for t in case.tensors()]
        return case._replace(x=moved[0], weight=moved[1], bias=moved[2], state=type(case.state)(*moved[3:]))

    return make


def exact(case):
    x, weight, bias, *leaves = (t.double() for t in case.tensors())
    return case._replace(x=x, weight=weight, bias=bias, state=type(case.state)(*leaves))


def assert_close(case, rel_error, values=5e-6, grads=2e-5, **options):
    expected = exact(case).run_with_gradients(backend="recurrent", **options)
    actual = case.run_with_gradients(backend="triton", **options)
    for tolerance, one, two in ((values, actual[0], expected[0]), (grads, actual[1], expected[1])):
        for a, e in zip(one, two, strict=True):
            assert a.shape == e.shape
            assert rel_error(a, e) < tolerance or torch.allclose(a.double(), e, rtol=0, atol=1e-6)


def test_equals_the_definition(case_on, cell_and_floor, scheme, rel_error):
    cell, floor = cell_and_floor
    assert_close(case_on(cell, (2, 4, 2, 5), floor=floor), rel_error)


@pytest.mark.parametrize("on", ["h", "state"])
@cells
def test_every_loss_alone(case_on, cell, on, rel_error):
    assert_close(case_on(cell, (2, 4, 1, 5)), rel_error, on=on)


@cells
def test_resets_and_an_empty_state(case_on, cell, scheme, rel_error):
    case = case_on(cell, (2, 5, 1, 5), empty=True)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 2], reset[1, 0], reset[1, 4] = True, True, True
    assert_close(case, rel_error, reset=reset)


@cells
def test_tiles_of_rows_and_dimensions(case_on, cell, scheme, rel_error):
    assert_close(case_on(cell, (18, 2, 1, 70 if scheme == "alternating" else 33)), rel_error)


def test_packed_documents(case_on, cell_and_floor, rel_error):
    cell, floor = cell_and_floor
    case = case_on(cell, (1, 6, 2, 3), floor=floor, states=3)
    offsets = torch.tensor([0, 4, 4, 6], dtype=torch.int32, device=case.x.device)
    assert_close(case, rel_error, cu_seqlens=offsets)


@cells
def test_nothing_crosses_a_boundary(case_on, cell, scheme):
    case = case_on(cell, (2, 4, 2, 3))
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[0, 2] = True
    inputs = [t.clone().requires_grad_() for t in case.tensors()]
    h, *last = case.run(*inputs, backend="triton", reset=reset)
    loss = h[0, 2:].sum() + sum(leaf[0].sum() for leaf in last)
    d_x, _, _, *d_state = torch.autograd.grad(loss, inputs)
    assert not d_x[0, :2].any()
    assert d_x[0, 2:].any()
    assert not d_x[1].any()
    assert not any(d.any() for d in d_state)
    other = case.x.clone()
    other[0, :2] = 100.0
    changed = case.run(other, *case.tensors()[1:], backend="triton", reset=reset)
    assert torch.equal(changed[0][0, 2:], h[0, 2:])
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], last, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(case_on, cell_and_floor, scheme, dtype, tolerance, rel_error):
    """Never worse than the definition evaluated in that precision."""
    cell, floor = cell_and_floor
    case = case_on(cell, (2, 4, 2, 6), floor=floor, dtype=dtype)
    expected = exact(case).run_with_gradients(backend="recurrent")
    actual = case.run_with_gradients(backend="triton")
    assert actual[0][0].dtype == actual[1][0].dtype == dtype
    for one, two in zip(actual, expected, strict=True):
        for a, e in zip(one, two, strict=True):
            assert rel_error(a, e) < tolerance


@cells
def test_without_gradients_and_by_steps(case_on, cell, scheme, rel_error):
    case = case_on(cell, (2, 3, 2, 5))
    h, *last = case.run_with_gradients(backend="triton")[0]
    quiet = case.run(backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(quiet, (h, *last), strict=True))
    state = case.state
    for t in range(3):
        one, state = rnn_step(
            cell, case.x[:, t], case.weight, case.bias, state, normalizer_floor=case.floor, backend="triton"
        )
        assert rel_error(one, h[:, t]) < 1e-6
    assert all(rel_error(a, e) < 1e-6 for a, e in zip(state, last, strict=True))


@pytest.mark.parametrize("low", [-1e3, -60.0])
def test_extreme_gates_stay_finite(case_on, cell_and_floor, low):
    cell, floor = cell_and_floor
    case = case_on(cell, (2, 6, 1, 4), floor=floor)
    case = case._replace(x=torch.where(torch.rand(case.x.shape) < 0.5, low, -low))
    outputs, gradients = case.run_with_gradients(backend="triton")
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


@cells
def test_strides_rows_determinism_and_no_bias(case_on, cell, rel_error):
    case = case_on(cell, (3, 4, 2, 5))
    head_first = case.x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    inner = case.x.transpose(3, 4).contiguous().transpose(3, 4)
    h, *_ = case.run(backend="triton")
    for x in (case.x, head_first, inner):
        assert torch.equal(case.run(x, *case.tensors()[1:], backend="triton")[0], h)
    other = case.x.clone()
    other[1:] = 7.0
    assert torch.equal(case.run(other, *case.tensors()[1:], backend="triton")[0][0], h[0])
    plain = case.run(case.x, case.weight, torch.zeros_like(case.bias), *case.state, backend="triton")[0]
    assert torch.equal(case.run(case.x, case.weight, None, *case.state, backend="triton")[0], plain)


def test_three_runs_have_the_same_bits(case_on, cell_and_floor, scheme):
    cell, floor = cell_and_floor
    case = case_on(cell, (2, 4, 2, 5), floor=floor)
    runs = [case.run_with_gradients(backend="triton") for _ in range(3)]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@cells
def test_splits_with_gradients_through_the_state(case_on, cell, scheme, rel_error):
    """Two calls joined by the state are one call: values and gradients."""
    case = case_on(cell, (2, 5, 1, 4))
    results = []
    for cuts in ((0, 5), (0, 2, 3, 5)):
        leaves = [t.clone().requires_grad_() for t in case.tensors()]
        x, weight, bias, *state = leaves
        pieces = []
        for a, b in itertools.pairwise(cuts):
            h, *state = case.run(x[:, a:b], weight, bias, *state, backend="triton")
            pieces.append(h)
        loss = sum(h.sin().sum() for h in pieces) + sum(leaf.square().sum() for leaf in state)
        results.append([torch.cat(pieces, 1), *state, *torch.autograd.grad(loss, leaves)])
    for one, two in zip(*results, strict=True):
        assert rel_error(one, two) < 1e-5 or torch.allclose(one, two, atol=1e-7)


@cells
def test_heads_and_rows_can_change_places(case_on, cell, scheme):
    """Bit for bit."""
    case = case_on(cell, (3, 3, 2, 5))
    rows, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    moved = case._replace(
        x=case.x[rows][:, :, :, heads], weight=case.weight[:, heads], bias=case.bias[:, heads],
        state=type(case.state)(*(leaf[rows][:, heads] for leaf in case.state)),
    )  # fmt: skip
    h, *last = case.run(backend="triton")
    other, *other_last = moved.run(backend="triton")
    assert torch.equal(h[rows][:, :, heads], other)
    assert all(torch.equal(a[rows][:, heads], b) for a, b in zip(last, other_last, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_hides_the_launches_of_large_heads(case_on, rel_error):
    """Forward and backward of alternating products and pointwise kernels, recorded once."""
    case = case_on("lstm", (4, 20, 2, 192), dtype=torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in case.tensors()]
    recorded = torch.cuda.make_graphed_callables(
        lambda *tensors: case.run(*tensors, backend="triton")[0], tuple(leaves)
    )
    results = []
    for function in (recorded, lambda *tensors: case.run(*tensors, backend="triton")[0]):
        h = function(*leaves)
        results.append([h, *torch.autograd.grad(h.float().square().sum(), leaves)])
    assert all(rel_error(a, b) < 1e-3 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 2, 3), (0, 3, 2, 3)])
def test_nothing_to_do(case_on, shape):
    outputs, gradients = case_on("slstm", shape).run_with_gradients(backend="triton")
    assert outputs[0].shape == (shape[0], shape[1], 2, 3)
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


def test_opcheck_and_compile(case_on):
    case = case_on("slstm", (2, 3, 2, 4))
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    state = torch.stack(tuple(case.state)).transpose(1, 2).detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.openxlstm.rnn_triton.default, ("slstm", *leaves, state, None, None, True),
        test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
        ),
    )  # fmt: skip

    def function(*tensors):
        return case.run(*tensors, backend="triton")[0] * 2

    tensors = case.tensors()
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(actual, function(*tensors))
    actual.sum().backward()
    assert all(t.grad is not None for t in leaves)


@pytest.mark.parametrize(
    ("shared", "name", "dtype", "expected"),
    [
        (232448, "sm_90", torch.bfloat16, 128), (166912, "sm_80", torch.float16, 128),
        (101376, "sm_86", torch.bfloat16, 64), (65536, "gfx942", torch.bfloat16, 64),
        (232448, "sm_90", torch.float32, 32),
    ],
)  # fmt: skip
def test_what_fits_on_the_chip(shared, name, dtype, expected, monkeypatch):
    """Consumer GPUs have less shared memory than the matrices of 128 dimensions take."""
    monkeypatch.setattr(configurations, "shared_memory", lambda _: shared)
    monkeypatch.setattr(configurations, "architecture", lambda _: name)
    assert configurations.fused_head_dim(torch.device("cuda"), dtype) == expected


def test_choice():
    assert "rnn/triton: chosen by 'auto'" in explain("rnn", device="cuda")
    assert "rnn/triton: chosen" not in explain("rnn", device="cpu")
    assert "not float64" in explain("rnn", device="cuda", dtype=torch.float64)
