"""The Triton backend against the float64 definition: on a GPU if there is one, else in the interpreter.

Every tensor that a kernel is to fill starts as NaN, so anything left out or read too early shows.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, conditioning, run
from test_chunkwise import plain_formula

from openxlstm.ops import dispatch, explain, mlstm
from openxlstm.ops.gpu import configurations, support
from openxlstm.state import mLSTMState

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # older interpreters
]
SMALL = Case(batch=1, time=21, heads=2)


@pytest.fixture(params=["states between chunks", "state on the chip"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forward schedules, whatever the shape would choose."""
    monkeypatch.setattr(configurations, "resident", lambda *_: request.param == "state on the chip")
    return request.param


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    with torch.device("cpu"):
        return {name: x.to(device) for name, x in case.inputs(dtype).items()}


def compare(case, inputs, rel_error, *, chunk_size=None, losses="hcnm", values=5e-6, grads=2e-5, **changes):
    """Values and gradients against float64, within the tolerance or as good as the portable backend."""
    exact = {name: x.double() for name, x in inputs.items()}
    expected, expected_grad = run(case, exact, "recurrent", losses=losses, **changes)
    portable, portable_grad = run(case, inputs, "chunkwise", losses=losses, **changes)
    actual, actual_grad = run(case, inputs, "triton", chunk_size=chunk_size, losses=losses, **changes)
    for tolerance, one, two, three in (
        (values, actual, expected, portable),
        (grads, actual_grad, expected_grad, portable_grad),
    ):
        for name, wanted in two.items():
            allowed = max(tolerance, 2 * rel_error(three[name], wanted))
            assert rel_error(one[name], wanted) < allowed, (name, rel_error(one[name], wanted), allowed)
            assert one[name].dtype == three[name].dtype


@pytest.mark.parametrize("name", CASES)
def test_float32_values_and_gradients(name, device, rel_error):
    case = CASES[name].but(batch=1, time=min(CASES[name].time, 37))
    compare(case, inputs_of(case, device), rel_error, chunk_size=16)


@pytest.mark.parametrize("name", ["plain", "odd_dims", "reset_and_forget", "sigmoid_unnormalized"])
def test_state_on_the_chip(name, device, rel_error, monkeypatch):
    """The other forward schedule: one tile of value columns and several, more than one tile of query/key
    dimensions, a chunk shorter than its tile."""
    monkeypatch.setattr(configurations, "resident", lambda *_: True)
    case = CASES[name].but(batch=1, time=37, with_state=True)
    compare(case, inputs_of(case, device), rel_error)
    case = case.but(v_dim=40, qk_dim=40, heads=1)
    compare(case, inputs_of(case, device), rel_error, chunk_size=13, losses="h")


@pytest.mark.parametrize("losses", ["h", "c", "n", "m", "cnm"])
def test_every_loss_alone(losses, device, rel_error):
    """Without a norm after h, and on the returned state."""
    case = SMALL.but(with_state=True, reset_every=9)
    compare(case, inputs_of(case, device), rel_error, chunk_size=16, losses=losses)


@pytest.mark.parametrize("chunk_size", [3, 21, 40, 70, 1000])
def test_any_chunk_length(chunk_size, device, rel_error):
    """Chunks shorter than a tile, and of several tiles with a ragged last one."""
    time = 12 if chunk_size == 3 else 75
    case = SMALL.but(time=time, heads=1, reset_every=31, with_state=True)
    compare(case, inputs_of(case, device), rel_error, chunk_size=chunk_size)


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(1, 80), (80, 17), (130, 16), (16, 1024), (1024, 1)])
def test_any_head_dimension(qk_dim, v_dim, device, rel_error):
    case = SMALL.but(heads=1, qk_dim=qk_dim, v_dim=v_dim, with_state=True)
    compare(case, inputs_of(case, device), rel_error, chunk_size=16)


def test_strides_and_out_of_bounds_reads(device, rel_error, schedule):
    """Head-first, expanded and sliced inputs; what surrounds a slice is NaN and must not be read."""
    case = SMALL.but(batch=2, with_state=True)
    x = inputs_of(case, device)

    def surrounded(t: torch.Tensor) -> torch.Tensor:
        block = torch.full([extent + 4 for extent in t.shape], torch.nan, device=device, dtype=t.dtype)
        block[tuple(slice(2, 2 + extent) for extent in t.shape)] = t
        return block[tuple(slice(2, 2 + extent) for extent in t.shape)]

    x["k"] = x["k"][:1].expand(2, -1, -1, -1)
    x["v"] = x["v"].mT.contiguous().mT
    plain = {name: t.contiguous() for name, t in x.items()}
    x["q"] = x["q"].transpose(1, 2).contiguous().transpose(1, 2)
    odd = {name: surrounded(t) if name in "kvif" else t for name, t in x.items()}
    arguments = {"state": mLSTMState(*(x[n] for n in ("c0", "n0", "m0"))), "chunk_size": 16}
    expected = mlstm(*(plain[n] for n in "qkvif"), backend="triton", **arguments)
    for given in (x, odd):
        leaves = [given[n].detach().requires_grad_() for n in "qkvif"]
        h = mlstm(*leaves, backend="triton", **arguments)
        assert torch.equal(h, expected)
        grads = torch.autograd.grad(h.square().sum(), leaves)
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("dtype", "forward", "backward", "gates"), [
    (torch.bfloat16, 6e-3, 1.2e-2, 2e-2), (torch.float16, 2e-3, 4e-3, 4e-3)
])  # fmt: skip
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_half_precision(dtype, forward, backward, gates, input_gate, device, rel_error, schedule):
    """The tolerances of the specification, over several chunks, with a state and losses on everything."""
    case = Case(batch=1, heads=1, time=70, qk_dim=16, v_dim=24, forget_mean=3.0, input_gate=input_gate)
    case = case.but(with_state=True, reset_every=37)
    x = inputs_of(case, device, dtype)
    expected, expected_grad = run(case, {name: t.double() for name, t in x.items()}, "recurrent")
    actual, actual_grad = run(case, x, "triton", chunk_size=32)
    assert actual["h"].dtype == dtype
    assert actual["c"].dtype == torch.float32
    well = (conditioning(x, case) < 10).transpose(1, 2)[..., None]
    assert well.float().mean() > 0.4
    assert rel_error(actual["h"] * well, expected["h"] * well) < forward
    for name, grad in expected_grad.items():  # rows of every conditioning
        assert rel_error(actual_grad[name], grad) < (gates if name in "if" else backward), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beats_the_plain_formula(dtype, device, rel_error, schedule):
    """Values and gradients, also where the plain formula keeps its gates in float32."""
    case = Case(batch=1, heads=1, time=48, qk_dim=16, v_dim=16, forget_mean=3.0)
    x = inputs_of(case, device, dtype)
    expected = run(case, {name: t.double() for name, t in x.items()}, "recurrent", losses="h")
    actual = run(case, x, "triton", chunk_size=32, losses="h")
    weight = torch.randn(
        expected[0]["h"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu"
    )
    for wide_gates in (False, True):
        y = {n: t.detach().clone().requires_grad_() for n, t in x.items()}
        h = plain_formula(*(y[n] for n in "qkv"), *(y[n].float() if wide_gates else y[n] for n in "if"))
        plain = torch.autograd.grad((h.double() * weight.to(device)).sum(), [y[n] for n in "qkvif"])
        assert rel_error(actual[0]["h"], expected[0]["h"]) <= rel_error(h, expected[0]["h"])
        for name, grad in zip("qkvif", plain, strict=True):
            wanted = expected[1][name]
            assert rel_error(actual[1][name], wanted) <= rel_error(grad, wanted), (name, wide_gates)


def test_scale_invariant_output(device, rel_error):
    """Under a norm of each head the shorter backward gives the gradients of the definition; h is the same."""
    case = Case(batch=1, heads=2, time=21, with_state=True)
    x = inputs_of(case, device)

    def normalised(inputs, **options):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        state = mLSTMState(*(leaves[n] for n in ("c0", "n0", "m0")))
        h, last = mlstm(*(leaves[n] for n in "qkvif"), state=state, return_state=True, eps=0.0, **options)
        loss = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=0.0).sin().sum() + last.c.square().sum()
        return h, torch.autograd.grad(loss, list(leaves.values()))

    exact, expected = normalised({n: t.double() for n, t in x.items()}, backend="recurrent")
    options = {"backend": "triton", "chunk_size": 16}
    h, actual = normalised(x, **options, assume_scale_invariant_output=True)
    assert torch.equal(h, normalised(x, **options)[0])
    assert rel_error(h, exact) < 5e-6
    for name, one, two in zip(x, actual, expected, strict=True):
        assert rel_error(one, two) < 2e-5 or torch.allclose(one.double(), two, atol=1e-7), name  # dn0 is 0


def test_packed_documents(device, rel_error, schedule):
    lengths = [5, 0, 1, 14]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    case = SMALL.but(time=sum(lengths))
    x = inputs_of(case, device)
    h = mlstm(*(x[n] for n in "qkvif"), cu_seqlens=offsets, chunk_size=16, backend="triton")
    again, last = mlstm(
        *(x[n] for n in "qkvif"), cu_seqlens=offsets, return_state=True, chunk_size=16, backend="triton"
    )
    for n, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone, state = mlstm(
            *(x[n][:, a:b].double() for n in "qkvif"), return_state=True, backend="recurrent"
        )
        assert rel_error(h[:, a:b], alone) < 5e-6
        assert rel_error(again[:, a:b], alone) < 5e-6
        assert all(rel_error(s[n], e[0]) < 5e-6 for s, e in zip(last, state, strict=True))


@pytest.mark.parametrize("kind", ["reset", "forget"])
def test_nothing_crosses_a_boundary(kind, device, schedule):
    """Bit for bit: neither values, nor states, nor gradients, whatever stands on the other side."""
    case, cut = SMALL.but(with_state=True), 9
    x = inputs_of(case, device)
    reset = None
    if kind == "reset":
        reset = torch.zeros(1, case.time, dtype=torch.bool)
        reset[0, cut] = True
    else:
        x["f"][:, cut] = -torch.inf
    y = {name: t.clone() for name, t in x.items()}
    for name in "qkvif":
        y[name][:, :cut] = torch.randn_like(y[name][:, :cut]) * 3
    y["c0"] = y["c0"] * 100
    results = []
    for given in (x, y):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        state = mLSTMState(*(leaves[n] for n in ("c0", "n0", "m0")))
        h, last = mlstm(
            *(leaves[n] for n in "qkvif"), state=state, reset=reset, return_state=True,
            chunk_size=16, backend="triton",
        )  # fmt: skip
        loss = h[:, cut:].square().sum() + sum(s.square().sum() for s in last)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert not any(grads[n][:, :cut].any() for n in "qkvif")
        assert not any(grads[n].any() for n in ("c0", "n0", "m0"))
        results.append([h[:, cut:], *last, *(grads[n][:, cut:] for n in "qkvi")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_split_causality_rows_and_determinism(device, rel_error, schedule):
    case = SMALL.but(batch=2, with_state=True, reset_every=8)
    x = inputs_of(case, device)
    state = mLSTMState(*(x[n] for n in ("c0", "n0", "m0")))
    reset = case.reset()
    arguments = {"chunk_size": 8, "backend": "triton", "return_state": True}
    whole, last = mlstm(*(x[n] for n in "qkvif"), state=state, reset=reset, **arguments)
    again, _ = mlstm(*(x[n] for n in "qkvif"), state=state, reset=reset, **arguments)
    assert torch.equal(whole, again)
    pieces = []
    for part in (slice(0, 13), slice(13, 21)):
        h, state = mlstm(*(x[n][:, part] for n in "qkvif"), state=state, reset=reset[:, part], **arguments)
        pieces.append(h)
    assert rel_error(torch.cat(pieces, 1), whole) < 2e-6
    assert all(rel_error(a, b) < 2e-6 for a, b in zip(state, last, strict=True))
    other = {n: x[n].clone() for n in "qkvif"}
    for t in other.values():
        t[0, 13:] = 2  # later, and of one row
    state = mLSTMState(*(x[n] for n in ("c0", "n0", "m0")))
    changed, _ = mlstm(*other.values(), state=state, reset=reset, **arguments)
    assert torch.equal(changed[:, :13], whole[:, :13])
    assert torch.equal(changed[1], whole[1])


@pytest.mark.parametrize("gate", [-1e3, 1e3, -torch.inf])
def test_extreme_gates_stay_finite(gate, device, rel_error, schedule):
    case = SMALL.but(time=18, heads=1, with_state=True)
    x = inputs_of(case, device)
    x["f"][:, ::3] = gate
    x["i"][:, 1::4] = -1e3 if gate > 0 else gate
    exact = {name: t.double() for name, t in x.items()}
    expected, _ = run(case, exact, "recurrent")
    actual, grads = run(case, x, "triton", chunk_size=16)
    for name, y in expected.items():
        assert rel_error(actual[name], y) < 1e-5, name
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize(("batch", "time"), [(2, 0), (0, 5), (1, 1)])
def test_empty_and_short(batch, time, device, schedule):
    case = SMALL.but(batch=batch, time=time, with_state=True)
    outputs, grads = run(case, inputs_of(case, device), "triton")
    assert outputs["h"].shape == (batch, time, 2, 12)
    assert all(t.isfinite().all() for t in (*outputs.values(), *grads.values()))


def test_opcheck(device):
    case = SMALL.but(with_state=True, reset_every=8, time=9)
    x = [t.requires_grad_() for t in inputs_of(case, device).values()]
    torch.library.opcheck(
        torch.ops.openxlstm.mlstm_triton.default, (*x, case.reset(), False, True, 1e-6, 16),
        test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
        ),
    )  # fmt: skip


def test_compiles_without_graph_breaks(device):
    case = SMALL.but(with_state=True)
    x = [t.requires_grad_() for t in inputs_of(case, device).values()]

    def function(q, k, v, i, f, c, n, m):
        h, last = mlstm(q, k, v, i, f, state=mLSTMState(c, n, m), return_state=True, backend="triton")
        return h * 2, last

    expected, _ = function(*x)
    actual, _ = torch.compile(function, fullgraph=True, backend="aot_eager")(*x)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(t.grad is not None for t in x)


def test_refusals_say_why(device, monkeypatch):
    request = dispatch.Request(torch.device("cpu"), torch.float32)
    assert dispatch.resolve("mlstm", "auto", request).name != "triton"
    gpu = dispatch.Request(torch.device("cuda"), torch.bfloat16)
    assert dispatch.resolve("mlstm", "auto", gpu).name == "triton"
    assert "not float64" in explain("mlstm", device="cuda", dtype=torch.float64)
    x = inputs_of(SMALL.but(time=2, qk_dim=1025), device)
    with pytest.raises(ValueError, match="up to 1024, got 1025"):
        mlstm(*x.values(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="only for tests, with TRITON_INTERPRET=1"):
        dispatch.resolve("mlstm", "triton", request)


@pytest.mark.parametrize("operator", ["mlstm", "mlstm_step", "mlstm_advance", "rnn", "rnn_step", "head_norm"])
def test_old_versions_and_old_devices_are_named(operator, monkeypatch):
    """Triton, GPU and device type: what there is, and what is needed."""
    monkeypatch.setattr(support, "VERSION", (3, 1))
    assert f"{operator}/triton: cannot: Triton 3.1 is too old, install 3.6 or newer" in explain(
        operator, device="cuda"
    )
    monkeypatch.setattr(support, "VERSION", None)
    assert "Triton is not installed (pip install 'openxlstm[gpu]')" in explain(operator, device="cuda")
    monkeypatch.setattr(support, "VERSION", (3, 9))
    monkeypatch.setattr(support, "_capability", lambda _: (7, 5))
    wanted = "needs an NVIDIA GPU of compute capability 8.0 or newer, this one has 7.5"
    assert wanted in explain(operator, device="cuda")
    assert "runs on CUDA and ROCm devices, not on mps" in explain(operator, device="mps")


def test_kernels_run_on_their_tensors_device(monkeypatch):
    """Whatever device is the current one."""
    entered = []

    class Guard:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    x = torch.zeros(1, device="cpu")
    support.Kernel({(1,): lambda *arguments, **_: entered.append(arguments)})[(1,)](None, x, 3, warps=1)
    assert entered == [x.device, (None, x, 3), None]


def test_strides_beyond_32_bits_are_copied():
    """Offsets within a chunk are 32 bits wide."""
    wide = torch.empty((1, 2, 1, 4), device="meta").as_strided((1, 2, 1, 4), (1, 2**21, 1, 1))
    assert support.unit_stride(wide).stride(1) == 4
    near = torch.empty((1, 2, 1, 4), device="meta").as_strided((1, 2, 1, 4), (1, 2**21 - 1, 1, 1))
    assert support.unit_stride(near) is near
