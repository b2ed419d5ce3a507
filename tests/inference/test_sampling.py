"""The distribution of the next token against brute force, and the independence of random numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.inference.sampling import (
    Sampler,
    SamplingConfig,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sampling_logits,
)

LOGITS = st.lists(st.integers(-99, 99).map(lambda n: n / 8), min_size=1, max_size=12, unique=True)
PENALTIES = st.sampled_from([1.0, 0.871, 1.137])  # cannot make two of these logits equal


def reference(logits: list[float], config: SamplingConfig, seen: set[int]) -> dict[int, float]:
    """Probabilities by the definition, in plain Python."""
    p = config.repetition_penalty
    z = {i: (x / p if x > 0 else x * p) if i in seen else x for i, x in enumerate(logits)}
    top = max(z.values())
    weight = {i: math.exp((x - top) / config.temperature) for i, x in z.items()}
    ranked = sorted(weight, key=lambda i: (-weight[i], i))
    if config.top_k:
        ranked = ranked[: config.top_k]
    total = sum(weight[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if kept and mass >= config.top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    kept = [i for i in kept if weight[i] >= config.min_p * weight[kept[0]]]
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


@given(
    LOGITS,
    st.floats(0.2, 3),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 1),
    PENALTIES,
    st.sets(st.integers(0, 11)),
)
@settings(max_examples=200, deadline=None)
def test_distribution_is_the_definition(logits, temperature, top_k, top_p, min_p, penalty, seen):
    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    mask = torch.tensor([i in seen for i in range(len(logits))])
    actual = sampling_logits(torch.tensor(logits), config, mask).double().softmax(-1)
    expected = reference(logits, config, seen)
    # a token whose cumulative probability or ratio sits on the threshold may fall on either side
    total = torch.tensor([expected.get(i, 0.0) for i in range(len(logits))], dtype=torch.float64)
    if not torch.allclose(actual, total, atol=1e-5):
        nudged = [
            reference(logits, dataclasses.replace(config, top_p=a, min_p=b), seen)
            for a in (max(top_p - 1e-5, 1e-6), min(top_p + 1e-5, 1.0))
            for b in (max(min_p * (1 - 1e-4), 0.0), min(min_p * (1 + 1e-4), 1.0))
        ]
        candidates = [torch.tensor([n.get(i, 0.0) for i in range(len(logits))]).double() for n in nudged]
        assert any(torch.allclose(actual, c, atol=1e-5) for c in candidates)


def test_filters_by_hand():
    inf = torch.inf
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (keep_top_k(logits, 2) > -inf).tolist() == [True, True, False, False]
    assert (keep_top_k(logits, 0) == logits).all()
    assert (keep_top_k(logits, 9) == logits).all()
    assert (keep_top_p(logits, 0.6) > -inf).tolist() == [True, True, False, False]
    assert (keep_top_p(logits, 0.01) > -inf).tolist() == [True, False, False, False]
    assert (keep_min_p(logits, 0.25) > -inf).tolist() == [True, True, True, False]
    seen = torch.tensor([True, False, True, False])
    both = penalize_repetition(torch.tensor([2.0, 2.0, -2.0, -2.0]), seen, 2.0)
    assert both.tolist() == [1.0, 2.0, -4.0, -2.0]


def test_filters_treat_rows_alone():
    logits = torch.randn(5, 40)
    config = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    rows = torch.stack([sampling_logits(row, config) for row in logits])
    assert torch.equal(sampling_logits(logits, config), rows)


def test_greedy_is_argmax_and_penalty_counts():
    logits = torch.tensor([1.0, 3.0, 2.5])
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=2.0), 3)
    assert sampler.draw(logits) == 1
    sampler.observe(1)
    assert sampler.draw(logits) == 2


def test_frequencies_follow_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=3), 5)
    draws = torch.tensor([sampler.draw(probabilities.log()) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=5) / 4000
    assert counts[2] == 0
    assert (counts - probabilities).abs().max() < 0.03


def test_same_seed_same_draws_and_copies():
    logits = torch.randn(100)
    one, two = (Sampler(SamplingConfig(seed=11), 100) for _ in range(2))
    assert [one.draw(logits) for _ in range(20)] == [two.draw(logits) for _ in range(20)]
    twin = one.copy()
    assert [one.draw(logits) for _ in range(20)] == [twin.draw(logits) for _ in range(20)]
    free = Sampler(SamplingConfig(), 100)
    again = Sampler(SamplingConfig(seed=free.seed), 100)
    assert [free.draw(logits) for _ in range(20)] == [again.draw(logits) for _ in range(20)]


def test_one_random_number_per_token():
    """What was drawn before changes nothing, so branches that meet again stay together."""
    config = SamplingConfig(seed=5, temperature=1.0)
    one, two = Sampler(config, 50), Sampler(config, 50)
    one.draw(torch.randn(50))
    two.draw(torch.randn(50))
    logits = torch.randn(50)
    assert one.draw(logits) == two.draw(logits)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    Sampler(SamplingConfig(), 10).draw(torch.randn(10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperature(temperature):
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=0), 3)
    tokens = {sampler.draw(torch.tensor([0.0, 5.0, 1.0])) for _ in range(50)}
    assert tokens == ({1} if temperature < 1 else {0, 1, 2})


def test_masked_and_half_precision_logits():
    sampler = Sampler(SamplingConfig(seed=0, top_p=0.9), 3)
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf], dtype=torch.bfloat16)
    assert {sampler.draw(logits) for _ in range(20)} == {1}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        Sampler(SamplingConfig(), 3).draw(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(ValueError, match="not finite"):
        Sampler(SamplingConfig(), 3).draw(torch.full((3,), -torch.inf))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop must be texts"),
        ({"temprature": 1}, "Did you mean 'temperature'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig().updated(**options)


def test_one_stop_string_may_stand_alone():
    assert SamplingConfig(stop="\n").stop == ("\n",)  # pyright: ignore[reportArgumentType]
    assert SamplingConfig(stop=["a", "b"]).stop == ("a", "b")  # pyright: ignore[reportArgumentType]


def test_whole_numbers_of_numpy() -> None:
    config = SamplingConfig(seed=np.int64(3), max_new_tokens=np.int32(4))  # type: ignore[arg-type]
    assert config == SamplingConfig(seed=3, max_new_tokens=4)
    assert type(config.seed) is type(config.max_new_tokens) is int
    with pytest.raises(ValueError, match="seed must be"):
        SamplingConfig(seed=np.float64(3))  # type: ignore[arg-type]
