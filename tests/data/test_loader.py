"""Packed batches: every token once, exact boundaries, an order that depends on seed and step alone."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openxlstm.checkpoint.tokenizer import byte_tokenizer
from openxlstm.data import Batch, PackedLoader, Texts, TokenDataset, prepare
from openxlstm.data.loader import Permutation

MakeDataset = Callable[..., TokenDataset]


def flatten(batches: list[Batch]) -> tuple[list[int], list[int], list[bool]]:
    return tuple(torch.cat([b[part].flatten() for b in batches]).tolist() for part in range(3))  # type: ignore[return-value]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_shuffled_epoch(dataset: TokenDataset, context: int, seed: int, epoch: int) -> list[int]:
    """Check the rows of an epoch against the definition; return how often each position was predicted."""
    stream: list[tuple[int, int, bool]] = []  # input, target, first
    for n in range(dataset.num_documents):
        ids = dataset.document(n).tolist()
        stream += zip([0, *ids], [*ids, 0], [True] + [False] * len(ids), strict=True)
    assert len(stream) == len(dataset)
    loader = PackedLoader(dataset, batch_size=1, context_length=context, seed=seed)
    counts = [0] * len(stream)
    for row in range(loader.rows):
        start = loader._row_start(epoch * loader.rows + row)
        positions = [(start + t) % len(stream) for t in range(context)]
        tokens, targets, reset = flatten([loader.batch(epoch * loader.rows + row)])
        assert list(zip(tokens, targets, reset, strict=True)) == [stream[p] for p in positions]
        for p in positions:
            counts[p] += 1
    return counts


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=15
    ),
    context=st.integers(1, 40),
    batch=st.integers(1, 5),
    shard=st.integers(1, 40),
    seed=st.integers(-3, 2**64),
)
def test_packing(documents: list[str], context: int, batch: int, shard: int, seed: int) -> None:
    with TemporaryDirectory() as directory:
        prepare(
            Texts(documents),
            directory,
            byte_tokenizer(),
            validation_fraction=0,
            shard_tokens=shard,
            progress=False,
        )
        dataset = TokenDataset.open(directory)
        expected = [byte_tokenizer().encode(text, bos=False) for text in documents]

        # sequential: joined, the batches are the documents, each with its BOS and end; the rest is ignored
        loader = PackedLoader(dataset, batch_size=batch, context_length=context, order="sequential")
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(b.tokens.shape == (batch, context) for b in batches)
        tokens, targets, reset = flatten(batches)
        n = len(dataset)
        assert targets[n:] == [-100] * (len(targets) - n)
        assert len(targets) - n < batch * context
        assert sum(b.num_targets for b in batches) == n
        assert not any(reset[n:])
        assert targets[:n] == [i for ids in expected for i in [*ids, 0]]
        assert tokens[:n] == [i for ids in expected for i in [0, *ids]]
        assert reset[:n] == [p == 0 for ids in expected for p in range(len(ids) + 1)]

        # shuffled: each position at most once an epoch, all but the remainder
        if n >= context:
            for epoch in (0, 1, 5):
                counts = check_shuffled_epoch(dataset, context, seed, epoch)
                assert Counter(counts) == Counter(
                    {1: n - n % context} | ({0: n % context} if n % context else {})
                )


def test_batch_types(dataset_of: MakeDataset, texts: list[str]) -> None:
    batch = next(iter(PackedLoader(dataset_of(texts), batch_size=3, context_length=16)))
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.bool]
    assert [t.shape for t in batch] == [(3, 16)] * 3
    assert batch.num_targets == 48
    assert same(batch.to("cpu"), batch)


def test_order_depends_on_seed_and_epoch(dataset_of: MakeDataset, texts: list[str]) -> None:
    dataset = dataset_of(texts)
    loader = PackedLoader(dataset, batch_size=4, context_length=32, seed=1)
    other = PackedLoader(dataset, batch_size=4, context_length=32, seed=2)
    assert not same(loader.batch(0), other.batch(0))
    assert same(loader.batch(3), PackedLoader(dataset, batch_size=4, context_length=32, seed=1).batch(3))
    starts = [[loader._row_start(e * loader.rows + r) for r in range(loader.rows)] for e in range(3)]
    assert len({tuple(s) for s in starts}) == len({min(s) for s in starts}) == 3


def test_order_is_pinned(dataset_of: MakeDataset) -> None:
    """The order is part of what a resumed run relies on: changing it is a change of format."""
    loader = PackedLoader(dataset_of(["abcdefghij" * 10]), batch_size=5, context_length=10, seed=7)
    first, second = [72, 62, 52, 21, 31, 11, 92, 1, 42, 82], [67, 17, 47, 7, 27, 57, 78, 98, 37, 88]
    assert [loader._row_start(row) for row in range(10)] == first
    assert [loader._row_start(row) for row in range(10, 20)] == second


def test_ranks_share_the_global_batch(dataset_of: MakeDataset, texts: list[str]) -> None:
    dataset = dataset_of(texts)
    for order in ("shuffled", "sequential"):
        whole = PackedLoader(dataset, batch_size=12, context_length=20, seed=3, order=order)
        for world in (2, 3, 12):
            for step in range(len(whole)):
                parts = [whole.batch(step, rank, world) for rank in range(world)]
                joined = Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
                assert same(joined, whole.batch(step))
        ranked = PackedLoader(
            dataset, batch_size=12, context_length=20, seed=3, order=order, rank=1, world_size=3
        )
        assert same(next(iter(ranked)), whole.batch(0, 1, 3))


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetching_changes_nothing(dataset_of: MakeDataset, texts: list[str], prefetch: int) -> None:
    loader = PackedLoader(dataset_of(texts), batch_size=4, context_length=32, prefetch=prefetch)
    steps = 2 * len(loader) + 1  # into the third epoch
    for step, batch in enumerate(itertools.islice(loader, steps)):
        assert loader.step == step + 1
        assert same(batch, loader.batch(step))
    assert loader.epoch == pytest.approx(steps * 4 / loader.rows)
    loader = PackedLoader(
        loader.dataset, batch_size=4, context_length=32, prefetch=prefetch, order="sequential"
    )
    assert all(same(a, b) for a, b in zip(loader, loader, strict=True))  # two passes at once
    assert loader.step == 0


def test_prefetching_thread_ends_with_the_iteration(dataset_of: MakeDataset, texts: list[str]) -> None:
    before = threading.active_count()
    iterator = iter(PackedLoader(dataset_of(texts), batch_size=4, context_length=32))
    next(iterator)
    assert threading.active_count() == before + 1
    del iterator
    assert threading.active_count() == before


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_is_exact_also_on_other_ranks(dataset_of: MakeDataset, texts: list[str], stop: int) -> None:
    dataset = dataset_of(texts)
    loader = PackedLoader(dataset, batch_size=4, context_length=32, seed=5)
    expected = list(itertools.islice(loader, 20))
    first = PackedLoader(dataset, batch_size=4, context_length=32, seed=5)
    list(itertools.islice(first, stop))
    state = first.state_dict()
    for rank in range(2):
        second = PackedLoader(
            TokenDataset.open(dataset.directory),
            batch_size=4,
            context_length=32,
            seed=5,
            rank=rank,
            world_size=2,
        )
        second.load_state_dict(state)
        rows = slice(2 * rank, 2 * rank + 2)
        for batch, whole in zip(second, expected[stop:], strict=False):
            assert same(batch, Batch(*(t[rows] for t in whole)))
        assert second.step == 21  # zip took one more


def test_state_of_another_run_is_refused(dataset_of: MakeDataset, texts: list[str], tmp_path: Path) -> None:
    dataset = dataset_of(texts)
    loader = PackedLoader(dataset, batch_size=4, context_length=32)
    state = loader.state_dict()
    for name, value in (("seed", 1), ("batch_size", 5), ("context_length", 31)):
        other = PackedLoader(dataset, **({"batch_size": 4, "context_length": 32} | {name: value}))
        with pytest.raises(ValueError, match=f"saved loader has {name}={state[name]}, this one {value}"):
            other.load_state_dict(state)
    prepare(Texts(texts[::-1]), tmp_path / "other", byte_tokenizer(), validation_fraction=0, progress=False)
    other = PackedLoader(TokenDataset.open(tmp_path / "other"), batch_size=4, context_length=32)
    with pytest.raises(ValueError, match="was saved with other data"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="has no 'seed'"):
        loader.load_state_dict({"step": 3, "order": "shuffled"})
    assert loader.step == 0


def test_batches_larger_than_the_data_repeat_it(dataset_of: MakeDataset) -> None:
    loader = PackedLoader(dataset_of(["abcdefg"]), batch_size=5, context_length=4)
    assert loader.rows == 2
    assert len(loader) == 1
    assert loader.batch(0).tokens.shape == (5, 4)


def test_errors(dataset_of: MakeDataset) -> None:
    dataset = dataset_of(["abc"])
    fine = {"batch_size": 2, "context_length": 4}
    for changes, message in (
        (
            {"context_length": 5},
            "train split has 4 tokens, fewer than one row of context_length 5; use a shorter",
        ),
        ({"batch_size": 0}, "batch_size and context_length must be at least 1, got 0 and 4"),
        ({"context_length": 0}, "must be at least 1, got 2 and 0"),
        ({"order": "random"}, "order must be 'shuffled' or 'sequential', got 'random'"),
        ({"prefetch": -1}, "prefetch must be at least 0"),
        ({"rank": 1}, "rank must be at least 0 and below world_size, got 1 of 1"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"world_size": 0}, "below world_size, got 0 of 0"),
        ({"world_size": 3}, "batch_size 2 cannot be divided among 3 ranks"),
        (
            {"vocab_size": 100},
            "has token id 100, but the model's vocabulary has 100 tokens; use vocab_size=257",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            PackedLoader(dataset, **(fine | changes))
    PackedLoader(dataset, **fine, vocab_size=101)
    loader = PackedLoader(dataset, **fine, order="sequential")
    assert len(loader) == 1
    for step in (-1, 1):
        with pytest.raises(IndexError, match=f"no batch {step}"):
            loader.batch(step)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_permutation_looks_random() -> None:
    """Over many keys, each place of a small range is about equally likely, and neighbours part."""
    places = Counter(Permutation(6, key * 1_000_003)(2) for key in range(6000))
    assert all(850 < places[place] < 1150 for place in range(6))
    big = [Permutation(100_000, 9)(n) for n in range(3000)]
    steps = [abs(a - b) for a, b in itertools.pairwise(big)]
    assert 30_000 < sum(steps) / len(steps) < 37_000
