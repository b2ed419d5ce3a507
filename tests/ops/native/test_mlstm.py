"""The native mLSTM over sequences equals the float64 definition under every instruction set."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, conditioning, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openxlstm.ops import explain, mlstm


def compare(case: Case, rel_error, *, chunk_size: int | None = None, losses: str = "hcnm") -> None:
    """Values and gradients in float32 against the definition in float64 on the same inputs.

    Rows whose normaliser cancels lose digits in any float32 arithmetic; the tolerance grows with that loss.
    """
    inputs = case.inputs(torch.float32)
    exact = {name: t.double() for name, t in inputs.items()}
    expected = run(case, exact, "recurrent", losses=losses)
    actual = run(case, inputs, "native", chunk_size=chunk_size, losses=losses)
    loss = max(1.0, float(conditioning(exact, case).max()) / 40)
    for a, e, tolerance in zip(actual, expected, (5e-6, 2e-5), strict=True):
        for name in e:
            assert a[name].shape == e[name].shape
            assert rel_error(a[name], e[name]) < tolerance * loss, name


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(isa, rel_error, name):
    compare(CASES[name], rel_error)
    compare(CASES[name], rel_error, chunk_size=5)


# around the sizes of register tiles: 6 and 12 rows, 8, 16 and 32 columns
@pytest.mark.parametrize(("dk", "dv"), [(6, 16), (7, 15), (17, 33), (32, 31), (64, 48), (1, 65)])
@pytest.mark.parametrize("chunk_size", [12, 13, 48, 50])
def test_shapes(isa, rel_error, dk, dv, chunk_size):
    case = Case(batch=1, time=101, qk_dim=dk, v_dim=dv, with_state=True, reset_every=40, forget_mean=1.0)
    compare(case.but(gate_std=0.5), rel_error, chunk_size=chunk_size)


@pytest.mark.parametrize("losses", ["h", "cnm", "c", "n"])
def test_each_loss(isa, rel_error, losses):
    compare(Case(with_state=True, time=50, qk_dim=16, v_dim=16), rel_error, chunk_size=16, losses=losses)


def test_published_dimensions(isa, rel_error):
    compare(Case(batch=1, time=130, heads=1, qk_dim=256, v_dim=512, forget_mean=3.0), rel_error)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    time=st.integers(1, 80),
    dk=st.integers(1, 40),
    dv=st.integers(1, 70),
    chunk_size=st.integers(1, 90),
    reset_every=st.sampled_from([0, 4, 30]),
    input_gate=st.sampled_from(["exp", "sigmoid"]),
    seed=st.integers(0, 10**6),
)
def test_any_shape(native, rel_error, time, dk, dv, chunk_size, reset_every, input_gate, seed):
    case = Case(
        time=time,
        qk_dim=dk,
        v_dim=dv,
        reset_every=reset_every,
        input_gate=input_gate,
        with_state=True,
        seed=seed,
    )
    inputs = case.inputs(torch.float32)
    expected, expected_grad = run(case, {n: t.double() for n, t in inputs.items()}, "recurrent")
    actual, actual_grad = run(case, inputs, "native", chunk_size=chunk_size)
    for name, e in expected.items():
        scale = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(actual[name].double() / scale, e / scale, rtol=0, atol=3e-5)
    for name, e in expected_grad.items():
        scale = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(actual_grad[name].double() / scale, e / scale, rtol=0, atol=3e-4)


def test_threads_and_neighbours_change_no_bit(isa, threads):
    case = Case(batch=3, time=70, heads=1, qk_dim=24, v_dim=140, with_state=True)
    inputs = case.inputs(torch.float32)
    threads(1)
    alone = run(case.but(batch=1), {n: t[:1] for n, t in inputs.items()}, "native", losses="")[0]
    first = run(case, inputs, "native")
    for count in (2, 3, 5):
        threads(count)
        again = run(case, inputs, "native")
        for a, b in zip(first, again, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
        split = run(case.but(batch=1), {n: t[:1] for n, t in inputs.items()}, "native", losses="")[0]
        assert all(torch.equal(split[name], alone[name]) for name in alone)
    assert all(torch.equal(first[0][name][:1], alone[name]) for name in alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(isa, rel_error, dtype):
    """Operands are widened exactly, so only the rounding of the outputs separates it from float32."""
    case = Case(time=40, qk_dim=16, v_dim=20)
    inputs = case.inputs(dtype)
    wide = run(case, {n: t.float() for n, t in inputs.items()}, "native", losses="c")
    actual = run(case, inputs, "native", losses="c")
    assert torch.equal(actual[0]["h"], wide[0]["h"].to(dtype))
    assert torch.equal(actual[0]["c"], wide[0]["c"])
    for name in "qkv":
        assert torch.equal(actual[1][name], wide[1][name].to(dtype))


def test_not_a_number_is_passed_on(isa):
    x = Case(time=20).inputs(torch.float32)
    x["v"][0, 3, 0, 2] = torch.nan
    h = mlstm(*(x[n] for n in "qkvif"), backend="native")
    assert torch.isnan(h[0, 3:, 0, 2]).all()
    assert torch.isfinite(h[1]).all()
    assert torch.isfinite(h[:, :, 1]).all()


def test_refuses_float64(native):
    x = Case(time=3).inputs()
    with pytest.raises(ValueError, match="float32, not float64"):
        mlstm(*(x[n] for n in "qkvif"), backend="native")


def test_is_chosen_by_auto(native):
    assert "mlstm/native: chosen by 'auto'" in explain("mlstm")
