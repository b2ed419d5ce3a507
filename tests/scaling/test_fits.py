"""Fits of synthetic data, and what they say about bad input; recovery and coverage: ``test_recovery.py``."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from openxlstm.scaling import (
    bootstrap,
    check_one_convention,
    check_runs,
    fit_isoflop,
    fit_parametric,
    fit_power_law,
    fit_runs,
    fit_time,
    isoflop_profiles,
    overtraining_slopes,
    read_runs,
)
from openxlstm.scaling.optimization import huber, minimize_batch

LAW = {"a": 6.0, "b": 7.0, "E": 1.8, "alpha": 0.34, "beta": 0.36}


def true_loss(n, d):
    """A known law."""
    return LAW["E"] + np.exp(LAW["a"]) * n ** -LAW["alpha"] + np.exp(LAW["b"]) * d ** -LAW["beta"]


def study(noise, seed):
    """80 runs, 8 sizes at 10 ratios of tokens to parameters, with log-normal noise: N, D, losses."""
    sizes, ratios = np.meshgrid(np.geomspace(2e7, 7e9, 8), np.geomspace(3, 3000, 10))
    n, d = sizes.ravel(), (sizes * ratios).ravel()
    return n, d, true_loss(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))


OPTIONS = {"delta": 0.02, "starts": 64, "polish": 2}


def table(n, d, losses, **columns):
    return pd.DataFrame(
        {"model": "mlstm", "context_length": 8192, "num_params": n, "num_tokens": d, "flops": 6 * n * d}
        | {"val_loss": losses} | columns
    )  # fmt: skip


# ---------------------------------------------------------------------- recovery of known laws


def test_an_exact_law_is_found_exactly():
    n, d, losses = study(0.0, 0)
    fit = fit_parametric(n, d, losses)
    assert fit.constants["E"] == pytest.approx(LAW["E"], rel=1e-6)
    assert (fit.alpha, fit.beta) == pytest.approx((LAW["alpha"], LAW["beta"]), rel=1e-6)
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.agreeing_starts >= 2
    assert fit.optimum(1e22).num_params * fit.optimum(1e22).num_tokens == pytest.approx(1e22 / 6)
    best = fit.optimum(1e22)
    for factor in (0.9, 1.1):
        assert fit(best.num_params * factor, best.num_tokens / factor) > best.loss
    with pytest.raises(AttributeError):
        fit.alfa  # noqa: B018


def test_a_law_with_gamma_is_found():
    n, d, _ = study(0.0, 0)
    losses = 1.2 + (np.exp(16.0) * n**-0.72 + np.exp(17.0) * d**-0.66) ** 0.25
    fit = fit_parametric(n, d, losses, free_gamma=True)
    assert fit.gamma == pytest.approx(0.25, rel=0.01)
    assert fit.constants["E"] == pytest.approx(1.2, rel=0.01)
    assert np.abs(fit(n, d) - losses).max() < 1e-6


def test_a_power_law_and_its_intervals():
    generator = np.random.default_rng(0)
    x = np.geomspace(1e18, 1e21, 80)
    law = fit_power_law(x, 0.01 * x**0.55 * np.exp(0.005 * generator.standard_normal(80)))
    assert law.exponent == pytest.approx(0.55, rel=0.02)
    a, b = law.interval(1e22)
    c, d = law.interval(1e22, prediction=True)
    assert c < a < float(law(1e22)) < b < d
    assert float(law.inverse(law(3e19))) == pytest.approx(3e19)
    assert law.extrapolation(1e20) == 1
    assert law.extrapolation(1e22) == pytest.approx(10)
    assert law.extrapolation(1e17) == pytest.approx(10)


def test_a_thousand_starts_take_seconds():
    n, d, losses = study(0.005, 1)
    start = time.process_time()
    fit = fit_parametric(n, d, losses, starts=2000, polish=4)
    assert time.process_time() - start < 20
    assert fit.agreeing_starts >= 2


def test_fits_are_reproducible():
    data = study(0.005, 2)
    first, second = (bootstrap(fit_parametric(*data, **OPTIONS), 20, seed=3) for _ in range(2))
    assert first.parameters == second.parameters
    assert np.array_equal(first.samples, second.samples)
    assert first.interval(1e9, 1e11) == second.interval(1e9, 1e11)
    assert not np.array_equal(first.samples, bootstrap(first, 20, seed=4).samples)


def test_gradients_are_the_derivatives():
    from openxlstm.scaling.objective import Problem

    n, d, losses = study(0.01, 0)
    for free in (False, True):
        problem = Problem(np.log(n), np.log(d), np.log(losses), 1e-3, free)
        point = problem.random_starts(1, 0)[0]
        value, gradient = problem.value_and_gradient(point)
        for index in range(len(point)):
            shift = np.zeros(len(point))
            shift[index] = 1e-6
            ends = [problem.value_and_gradient(point + sign * shift)[0] for sign in (1, -1)]
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)
        assert problem.to_local([problem.to_global(point)])[0] == pytest.approx(point)
        assert value > 0


def test_shapes_do_not_broadcast():
    """The published R^2 compared (n, 1) predictions with (n,) targets; ours cannot."""
    n, d, losses = study(0.01, 0)
    flat = fit_parametric(n, d, losses, **OPTIONS)
    column = fit_parametric(n[:, None], d[:, None], losses[:, None], **OPTIONS)
    assert column.parameters == flat.parameters
    assert column.r_squared == flat.r_squared > 0.99
    assert flat.residuals.shape == (80,)


def test_the_huber_loss_ignores_an_outlier():
    x = np.linspace(0, 1, 50)

    def line(points):
        return points[:, :1] + points[:, 1:] * x, np.broadcast_to(
            np.stack([np.ones(50), x], 1), (len(points), 50, 2)
        )

    targets = 1 + 2 * x
    targets[10] = 100.0
    points, objectives = minimize_batch(line, targets, np.zeros((3, 2)), 0.01, iterations=200)
    assert points == pytest.approx(np.array([[1, 2]] * 3), abs=0.01)
    assert objectives == pytest.approx(objectives[0])
    assert huber(np.array([0.5, 2.0]), 1.0) == pytest.approx([0.125, 1.5])


# ---------------------------------------------------------------------- diagnostics


def test_diagnostics_say_what_is_not_identified():
    n, d, losses = study(0.005, 0)
    assert not [
        note for note in fit_parametric(n, d, losses, **OPTIONS).diagnostics() if "one variable" in note
    ]
    n = np.geomspace(1e8, 1e10, 12)
    tied = fit_parametric(n, 20 * n, true_loss(n, 20 * n), **OPTIONS).diagnostics()
    assert any("almost one variable" in note for note in tied)
    n, d = np.geomspace(1e8, 2e8, 12), np.geomspace(1e10, 1e12, 12)[::-1]
    narrow = fit_parametric(n, d, true_loss(n, d), **OPTIONS).diagnostics()
    assert any("num_params spans only a factor of 2.0" in note for note in narrow)


def test_an_optimum_outside_the_runs_is_marked():
    n = np.geomspace(1e9, 4e9, 8)
    losses = 2 + 0.5 * (np.log10(n) - 8.7) ** 2
    fit = fit_isoflop(n, losses, budget=1e20)
    assert fit.optimum == pytest.approx(10**8.7)
    assert any("below all runs, by a factor of 2.0" in note for note in fit.notes)
    assert fit(n) == pytest.approx(losses)


# ---------------------------------------------------------------------- bad input


def test_missing_columns_are_named(tmp_path: Path):
    runs = table(*study(0.0, 0)).rename(columns={"val_loss": "loss"}).drop(columns="flops")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ValueError, match="lacks the columns flops, val_loss"):
        read_runs(tmp_path / "runs.csv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_runs(tmp_path / "other.csv")
    (tmp_path / "runs.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither .csv nor .parquet"):
        read_runs(tmp_path / "runs.pkl")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_runs(tmp_path / "bad.parquet")
    runs.head(0).to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(ValueError, match="lacks the columns flops"):
        read_runs(tmp_path / "empty.csv")


def test_csv_and_parquet_give_the_same(tmp_path: Path):
    runs = table(*study(0.01, 0))
    runs.to_csv(tmp_path / "runs.csv", index=False)
    runs.to_parquet(tmp_path / "runs.parquet")
    pd.testing.assert_frame_equal(
        read_runs(tmp_path / "runs.csv"), read_runs(tmp_path / "runs.parquet"), check_dtype=False
    )


def test_losses_that_are_not_finite_are_left_out_and_counted():
    n, d, losses = study(0.0, 0)
    losses[[3, 5]] = np.nan
    losses[7] = np.inf
    with pytest.warns(UserWarning, match="left out 3 of 80 runs without a finite value of val_loss in 3"):
        assert len(check_runs(table(n, d, losses))) == 77
    with pytest.raises(ValueError, match="losses must be positive and finite"):
        fit_parametric(n, d, losses)
    with pytest.raises(ValueError, match="2 losses that are not finite"):
        fit_isoflop(n[:6], [1, 2, np.nan, 3, np.nan, 2], budget=1e20)
    with (
        pytest.warns(UserWarning, match="left out 80"),
        pytest.raises(ValueError, match="has no complete run"),
    ):
        check_runs(table(n, d, np.full(80, np.nan)))


def test_values_that_are_no_numbers_or_not_positive():
    n, d, losses = study(0.0, 0)
    runs = table(n, d, losses).astype({"flops": object})
    runs.loc[4, "flops"] = "many"
    with pytest.raises(ValueError, match="column flops holds 'many' in row 4, which is not a number"):
        check_runs(runs)
    runs = table(n, d, losses)
    runs.loc[4, "num_tokens"] = -1.0
    with pytest.raises(ValueError, match=r"column num_tokens holds -1.0; it must be positive"):
        check_runs(runs)


def test_too_few_runs():
    n, d, losses = study(0.0, 0)
    with pytest.raises(ValueError, match="a parametric fit needs at least 7 runs, got 6"):
        fit_parametric(n[:6], d[:6], losses[:6])
    with pytest.raises(ValueError, match=r"the profile at 1e\+20 FLOPs needs at least 3 runs, got 2"):
        fit_isoflop(n[:2], losses[:2], budget=1e20)
    with pytest.raises(ValueError, match=r"the profile at 7e\+25 FLOPs needs at least 3 runs, got 0"):
        isoflop_profiles(table(n, d, losses), [7e25])
    with pytest.raises(ValueError, match="a power law needs at least 2 runs, got 1"):
        fit_power_law([1], [1])
    with pytest.raises(ValueError, match="a model of times needs at least 3 runs"):
        fit_time([1, 2], [1, 2])
    with pytest.raises(ValueError, match="at least 2 samples"):
        bootstrap(fit_parametric(n, d, losses, **OPTIONS), 1)


def test_a_profile_without_a_minimum():
    with pytest.raises(ValueError, match="opens downwards"):
        fit_isoflop([1e8, 1e9, 1e10], [2.0, 3.0, 2.0], budget=1e20)


def test_conventions_are_not_mixed():
    n, d, losses = study(0.0, 0)
    runs = table(n, d, losses)
    check_one_convention(runs)
    other = runs.copy()
    other["flops"] *= 1.2
    both = pd.concat([runs, other], ignore_index=True)
    with pytest.raises(ValueError, match="FLOPs were counted in different ways"):
        fit_runs(both)
    named = pd.concat([runs.assign(flops_convention="distill"), other.assign(flops_convention="chinchilla")])
    with pytest.raises(ValueError, match=r"2 conventions \(chinchilla, distill\)"):
        isoflop_profiles(named, [1e20])


def test_one_law_per_family_and_context():
    n, d, losses = study(0.0, 0)
    for column, values in (("model", ["mlstm", "llama"]), ("context_length", [2048, 8192])):
        mixed = table(n, d, losses, **{column: list(itertools.islice(itertools.cycle(values), 80))})
        with pytest.raises(ValueError, match=f"a law belongs to one {column}"):
            fit_runs(mixed)


def test_nothing_to_learn_from():
    n, d, losses = study(0.0, 0)
    with pytest.raises(ValueError, match=r"all num_params are 2e\+07"):
        fit_parametric(np.full(80, 2e7), d, losses)
    with pytest.raises(ValueError, match="delta must be positive"):
        fit_parametric(n, d, losses, delta=0)
    with pytest.raises(ValueError, match="differ in number"):
        fit_parametric(n, d, losses[:-1])
    with pytest.raises(ValueError, match="needs different x"):
        fit_power_law([3, 3], [1, 2])
    with pytest.raises(ValueError, match="no bootstrap samples"):
        fit_parametric(n, d, losses, **OPTIONS).interval(1e9, 1e10)
    with pytest.raises(ValueError, match="no column preset_ratio"):
        overtraining_slopes(table(n, d, losses))
    with pytest.raises(ValueError, match="no slope to fit"):
        overtraining_slopes(table(n, d, losses, preset_ratio="extra"))


def test_times_stay_physical():
    work = np.geomspace(1e12, 1e15, 20)
    model = fit_time(work, work / 3e14 + 2e-3)
    assert (model.rate, model.latency) == pytest.approx((3e14, 2e-3), rel=1e-4)
    assert float(model(6e14)) == pytest.approx(2.002, rel=1e-4)
    odd = fit_time(work, work / 3e14 * 1.0 - 1e-3 * work / work.max(), np.ones(20))  # pulls latencies down
    assert min(odd.rate, odd.latency, odd.row_latency) > 0
    bounded = fit_time(work, np.full(20, 1e-2), peak=1e15)
    assert bounded.rate <= 1e15 * (1 + 1e-9)
    with pytest.raises(ValueError, match="positive and finite"):
        fit_time(work, work * 0)
