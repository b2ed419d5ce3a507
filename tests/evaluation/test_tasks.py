"""Generators agree with independent oracles, are balanced, and depend on the address of a sample alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch

from openxlstm.evaluation.streams import Stream
from openxlstm.evaluation.tasks import TASKS, get_task
from openxlstm.evaluation.tasks.arithmetic import render
from openxlstm.evaluation.tasks.recall import MultiQueryRecall
from openxlstm.evaluation.tasks.task import Task

IGNORED = oracles.IGNORED
RANGE = {"mqar-small": (32, 64)}
STRINGS = 1000


def span(task: Task) -> tuple[int, int]:
    return task.shortest, max(40, task.shortest + 8)


@pytest.mark.parametrize("name", sorted(oracles.PREFIX))
def test_every_prefix_agrees_with_the_oracle(name: str) -> None:
    task = TASKS[name]
    batch = task.batch("train", range(STRINGS), lengths=span(task), protocol="every")
    for tokens, targets, length in zip(*(part.tolist() for part in batch), strict=True):
        assert tokens[length:] == [0] * (len(tokens) - length)
        assert set(targets[length:]) <= {IGNORED}
        ends = range(length) if length <= 12 else (length // 2, length - 2, length - 1)
        for end in ends:
            assert targets[end] == oracles.PREFIX[name](tokens[: end + 1]), (tokens, end)


@pytest.mark.parametrize("name", sorted(oracles.LAST))
def test_last_answer_agrees_with_the_oracle(name: str) -> None:
    task = TASKS[name]
    batch = task.batch("test", range(STRINGS), lengths=span(task), protocol="last")
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        ((position, answer),) = oracles.asked(tokens, targets)
        word = tokens[:position]
        if name == "induction":
            word = tokens[: position + 1]
        else:
            assert tokens[position:] == [0] * (len(tokens) - position)
        assert answer == oracles.LAST[name](word), word


@pytest.mark.parametrize("name", ["modular-arithmetic-brackets", "solve-equation"])
def test_long_expressions_agree_with_the_oracle(name: str) -> None:
    batch = TASKS[name].batch("test", range(40), lengths=(250, 600))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        ((position, answer),) = oracles.asked(tokens, targets)
        assert answer == oracles.LAST[name](tokens[:position])


@pytest.mark.parametrize("name", ["bucket-sort", "reverse-string", "duplicate-string", "copying"])
def test_output_strings_agree_with_the_oracle(name: str) -> None:
    task = TASKS[name]
    batch = task.batch("test", range(STRINGS), lengths=span(task))
    for tokens, targets, length in zip(*(part.tolist() for part in batch), strict=True):
        positions, answers = zip(*oracles.asked(tokens, targets), strict=True)
        assert tokens[length] == task.vocab_size - 1
        assert list(positions) == list(range(length, length + len(answers)))
        assert list(answers) == oracles.rewriting(tokens[:length], name)
        assert tokens[length + 1 :] == [0] * (len(tokens) - length - 1)


@pytest.mark.parametrize(
    "task",
    [
        *(task for task in TASKS.values() if isinstance(task, MultiQueryRecall)),
        MultiQueryRecall("filled", 6, 64, random_filler=True),
    ],
    ids=lambda task: task.name,
)
def test_recall_agrees_with_the_oracle(task: MultiQueryRecall) -> None:
    batch = task.batch("test", range(STRINGS), lengths=(task.shortest, task.shortest + 64))
    for tokens, targets, length in zip(*(part.tolist() for part in batch), strict=True):
        found, memory = oracles.asked(tokens, targets), oracles.written(tokens, task.pairs)
        assert len({tokens[n] for n, _ in found}) == len(found) == task.pairs
        for position, answer in found:
            assert 2 * task.pairs <= position < length
            assert position % 2 == 0
            assert answer == memory[tokens[position]]
            assert 0 < tokens[position] < task.vocab_size // 2 <= answer < task.vocab_size


def test_published_places_favour_early_ones() -> None:
    batch = TASKS["mqar-4"].batch("train", range(4000), lengths=(64, 64))
    places = (batch.targets != IGNORED).nonzero()[:, 1].sub(8).div(2).long()
    share = torch.bincount(places, minlength=28) / 4000
    assert share[0] > 0.6  # drawn first with p ~ 1 / place
    assert share[0] > share[5] > share[20] > 0


def answer_distribution(task: Task, length: int) -> np.ndarray:
    """Exact probabilities of the answers to strings of ``length``, by dynamic programming where needed."""
    if task.name == "cycle-navigation":
        p = np.eye(5)[0]
        for _ in range(length):
            p = (p + np.roll(p, 1) + np.roll(p, -1)) / 3
        return p
    if task.name == "modular-arithmetic":
        states = {(0, d): 0.2 for d in range(5)}  # (closed terms, open term)
        for _ in range(length // 2):
            following: dict[tuple[int, int], float] = {}
            for (closed, term), p in states.items():
                for d in range(5):
                    for state in (
                        ((closed + term) % 5, d), ((closed + term) % 5, -d % 5), (closed, term * d % 5)
                    ):  # fmt: skip
                        following[state] = following.get(state, 0) + p / 15
            states = following
        return np.bincount([sum(s) % 5 for s in states], list(states.values()), 5)
    if task.name == "modular-arithmetic-brackets":
        table: list[np.ndarray] = [np.zeros(5)] + [np.full(5, 0.2)] * 4
        for size in range(5, length + 1):
            total = np.zeros(5)
            for left in range(1, size - 3):
                for a in range(5):
                    for b in range(5):
                        weight = table[left][a] * table[size - 3 - left][b] / (size - 4) / 3
                        for result in (a + b, a - b, a * b):
                            total[result % 5] += weight
            table.append(total)
        return table[length]
    if task.name == "majority-count":
        from math import comb

        p = np.zeros(256)
        for twos in range(length + 1):
            p[max(twos, length - twos) - 1] += comb(length, twos) / 2**length
        return p
    return np.full(len(task.answers), 1 / len(task.answers))


BALANCED = sorted({*TASKS} - {f"mqar-{n}" for n in (16, 32, 48, 64, 96, 256)})  # the same but for pairs


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", BALANCED)
def test_classes_are_balanced(name: str, split: str) -> None:
    """Every answer occurs as often as it should, within three standard errors of its share.

    That is asked of each class that is expected at least ten times (below, a share is far from normal; such
    classes count as one). Of 4,096 independent classes eleven lie beyond three standard errors in sound
    data, so there it is asked of two sums over all classes: Pearson's statistic, which has mean K - 1 and
    variance 2 (K - 1), and the number of classes beyond, which is binomial.
    """
    task = TASKS[name]
    (length,) = task.lengths(span(task)[1] - 4, span(task)[1])[-1:].tolist()
    protocol = "last" if "last" in task.protocols else None
    strings = 24_000 if len(task.answers) > 1000 else 6000
    batch = task.batch(split, range(strings), lengths=(length, length), protocol=protocol)
    answers = batch.targets[batch.targets != IGNORED]
    independent = len(answers) // (2 if name == "duplicate-string" else 1)
    counts = torch.bincount(answers, minlength=task.vocab_size)[list(task.answers)].numpy()
    assert counts.sum() == len(answers)
    found, expected = counts / len(answers), answer_distribution(task, length)
    rare = expected * independent < 10
    found, expected = (np.append(share[~rare], share[rare].sum()) for share in (found, expected))
    found, expected = found[expected > 0], expected[expected > 0]
    distance = (found - expected) / np.sqrt(expected * (1 - expected) / independent)
    if len(expected) < 1000:
        assert np.abs(distance).max() <= 3, distance
    else:
        freedom, beyond = len(expected) - 1, 0.0027 * len(expected)
        statistic = (independent * (found - expected) ** 2 / expected).sum()
        assert abs(statistic - freedom) <= 3 * np.sqrt(2 * freedom)
        assert abs((np.abs(distance) > 3).sum() - beyond) <= 3 * np.sqrt(beyond)


def test_symbols_are_balanced() -> None:
    for limit in (2, 3, 5, 64, 100, 4096):
        stream = Stream("balance", "train", range(300))
        counts = np.bincount(stream.below(limit, 4001).ravel(), minlength=limit)
        share = 1 / limit
        error = np.sqrt(counts.sum() * share * (1 - share))
        assert np.abs(counts - counts.sum() * share).max() < 5 * error
        assert len(counts) == limit


def test_neighbouring_samples_and_positions_are_uncorrelated() -> None:
    bits = Stream("correlation", "train", range(2000)).bits(256).astype(np.float64) * 2 - 1
    assert abs((bits[:, 1:] * bits[:, :-1]).mean()) < 5 / np.sqrt(bits.size)
    assert abs((bits[1:] * bits[:-1]).mean()) < 5 / np.sqrt(bits.size)


def test_distinct_values_are_all_equally_likely() -> None:
    values = Stream("distinct", "train", range(20000)).distinct(4, 3)
    assert (np.sort(values, axis=1)[:, 1:] > np.sort(values, axis=1)[:, :-1]).all()
    codes = np.unique(values @ np.array([16, 4, 1]), return_counts=True)[1]
    assert len(codes) == 24
    assert np.abs(codes - 20000 / 24).max() < 5 * np.sqrt(20000 / 24)
    assert sorted(Stream("all", "train", [3]).distinct(63, 63)[0]) == list(range(63))
    with pytest.raises(ValueError, match="cannot choose 5 different values out of 4"):
        Stream("distinct", "train", [0]).distinct(4, 5)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_string_does_not_depend_on_its_batch(name: str) -> None:
    task = TASKS[name]
    low, high = span(task)
    whole = task.batch("train", range(40), lengths=(low, high), seed=3)
    part = task.batch("train", [31, 5], lengths=(low, high), seed=3)
    for row, index in enumerate((31, 5)):
        for ours, theirs in ((part.tokens, whole.tokens), (part.targets, whole.targets)):
            width = min(ours.shape[1], theirs.shape[1])
            assert torch.equal(ours[row, :width], theirs[index, :width])
        assert part.lengths[row] == whole.lengths[index]
    others = [
        task.batch("test", range(40), lengths=(low, high), seed=3),
        task.batch("train", range(40), lengths=(low, high), seed=4),
    ]
    for other in others:
        assert not torch.equal(other.lengths, whole.lengths) or not torch.equal(other.tokens, whole.tokens)


DIGEST = """
import json, sys
from openxlstm.evaluation.tasks import TASKS
names, first, last = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
batches = [TASKS[n].batch("train", range(first, last), lengths=(32, 32), protocol=None) for n in names]
print(json.dumps([b.tokens.tolist() for b in batches]))
"""


def test_any_number_of_workers_gives_the_same_data() -> None:
    names = ("s3", "mqar-small", "modular-arithmetic-brackets")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST, json.dumps(names), str(n), str(n + 20)], stdout=subprocess.PIPE
        )
        for n in (0, 20, 40)
    ]
    parts = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    for number, name in enumerate(names):
        whole = TASKS[name].batch("train", range(60), lengths=(32, 32), protocol=None)
        assert [row for part in parts for row in part[number]] == whole.tokens.tolist()


@pytest.mark.parametrize(
    ("name", "lengths", "protocol", "message"),
    [
        ("majority", (4, 4), None, "task 'majority' has no strings of length 4: .* go up in steps of 2"),
        ("even-pairs", (0, 1), None, "no strings of a length from 0 to 1: its lengths start at 2"),
        ("majority-count", (300, 400), None, "start at 1 and end at 256"),
        ("parity", (40, 3), None, "from the shorter to the longer, got 40 to 3"),
        ("solve-equation", (3, 9), "every", "has no protocol 'every'; it has last"),
    ],
)
def test_impossible_strings(name: str, lengths: tuple[int, int], protocol: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].batch("train", range(4), lengths=lengths, protocol=protocol)


def test_names() -> None:
    assert get_task("Even_Pairs").name == "even-pairs"
    with pytest.raises(ValueError, match=r"unknown task 'parrity'. Did you mean 'parity'\? Tasks: parity, "):
        get_task("parrity")
    with pytest.raises(ValueError, match="split must be one of"):
        TASKS["parity"].batch("dev", range(2), lengths=(3, 4))
    with pytest.raises(ValueError, match="indices is empty"):
        TASKS["parity"].batch("train", [], lengths=(3, 4))
    with pytest.raises(ValueError, match="sample numbers from 0"):
        TASKS["parity"].batch("train", [-1], lengths=(3, 4))


def test_rendering() -> None:
    assert render([10, 7, 5, 11, 9, 0]) == "(-4)="
    assert TASKS["parity"].render([1, 2]) == "1 2"
