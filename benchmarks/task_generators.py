"""Speed of the task generators beside a per-sample Python loop that makes the same kind of strings and
answers.

    python benchmarks/task_generators.py [--batch 1024] [--length 256]

The loops are the obvious ones: symbols drawn with ``random``, the answer worked out along the way, lists
turned into one tensor per batch. Both sides make whole batches of int64 tokens and targets, in their usual
protocol.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from harness import RESULTS, disturbance, environment, parser, warn
from openxlstm.evaluation.tasks import Task, get_task
from openxlstm.inference.measurement import OtherLoad
from openxlstm.runtime import atomic_write_text

Sample = tuple[list[int], list[int]]
IGNORED = -100


def parity(length: int) -> Sample:
    tokens, targets, state = [], [], 0
    for _ in range(length):
        bit = random.randrange(2)
        state ^= bit
        tokens.append(1 + bit)
        targets.append(1 + state)
    return tokens, targets


def even_pairs(length: int) -> Sample:
    tokens, targets, changes = [], [], 0
    for _ in range(length):
        tokens.append(random.randrange(1, 3))
        changes += len(tokens) > 1 and tokens[-1] != tokens[-2]
        targets.append(2 - changes % 2)
    return tokens, targets


def cycle_navigation(length: int) -> Sample:
    tokens, targets, place = [], [], 0
    for _ in range(length):
        step = random.choice((0, 1, -1))
        place = (place + step) % 5
        tokens.append({0: 1, 1: 2, -1: 3}[step])
        targets.append(4 + place)
    return tokens, targets


def modular_arithmetic(length: int) -> Sample:
    tokens, targets, closed, term = [], [], 0, 0
    for place in range(0, length, 2):
        digit = random.randrange(5)
        operator = random.choice("+-*") if place else "+"
        if place:
            tokens.append("+-*".index(operator) + 6)
            targets.append(IGNORED)
        if operator == "*":
            term = term * digit % 5
        else:
            closed, term = (closed + term) % 5, digit if operator == "+" else -digit
        tokens.append(1 + digit)
        targets.append(1 + (closed + term) % 5)
    return tokens, targets


def expression(length: int, operators: str) -> tuple[list[str], int]:
    if length <= 4:
        digit = random.randrange(5)
        text = {1: ["d"], 2: ["-", "d"], 3: ["(", "d", ")"], 4: ["(", "-", "d", ")"]}[length]
        return [str(digit) if part == "d" else part for part in text], -digit if "-" in text else digit
    size = random.randint(1, length - 4)
    operator = random.choice(operators)
    (left, a), (right, b) = expression(size, operators), expression(length - 3 - size, operators)
    value = a + b if operator == "+" else a - b if operator == "-" else a * b
    return ["(", *left, operator, *right, ")"], value % 5


def encoded(parts: list[str]) -> list[int]:
    return [int(part) + 1 if part.isdigit() else "+-*=()x".index(part) + 6 for part in parts]


def brackets(length: int) -> Sample:
    text, value = expression(length, "+-*")
    return [*encoded(text), 9, 0], [IGNORED] * (length + 1) + [1 + value % 5]


def solve_equation(length: int) -> Sample:
    text, value = expression(length, "+-")
    at = random.choice([n for n, part in enumerate(text) if part.isdigit()])
    answer, text[at] = int(text[at]), "x"
    return [*encoded(text), 9, 1 + value % 5, 0], [IGNORED] * (length + 2) + [1 + answer]


def word_problem(size: int) -> Callable[[int], Sample]:
    elements = list(itertools.permutations(range(size)))
    numbers = {element: n for n, element in enumerate(elements)}

    def sample(length: int) -> Sample:
        tokens, targets, state = [], [], tuple(range(size))
        for _ in range(length):
            n = random.randrange(len(elements))
            state = tuple(elements[n][thing] for thing in state)
            tokens.append(1 + n)
            targets.append(1 + numbers[state])
        return tokens, targets

    return sample


def majority(length: int) -> Sample:
    tokens, targets, ahead = [], [], 0
    for _ in range(length):
        bit = random.randrange(2)
        ahead += 1 if bit else -1
        tokens.append(1 + bit)
        targets.append(IGNORED if ahead == 0 else 1 + (ahead > 0))
    return tokens, targets


def majority_count(length: int) -> Sample:
    tokens, targets, counts = [], [], [0, 0]
    for _ in range(length):
        bit = random.randrange(2)
        counts[bit] += 1
        tokens.append(1 + bit)
        targets.append(2 + max(counts))
    return tokens, targets


def rewriting(symbols: int, rewrite: Callable[[list[int]], list[int]]) -> Callable[[int], Sample]:
    def sample(length: int) -> Sample:
        word = [random.randrange(1, symbols + 1) for _ in range(length)]
        answer = rewrite(word)
        return [*word, symbols + 1, *[0] * (len(answer) - 1)], [IGNORED] * length + answer

    return sample


def missing_duplicate(length: int) -> Sample:
    word = [random.randrange(1, 9) for _ in range(length // 2)] * 2
    at = random.randrange(length)
    answer, word[at] = word[at], 9
    return [*word, 0], [IGNORED] * length + [answer]


def recall(pairs: int, vocabulary: int) -> Callable[[int], Sample]:
    half = vocabulary // 2

    def sample(length: int) -> Sample:
        keys = random.sample(range(1, half), pairs)
        values = [random.randrange(half, vocabulary) for _ in range(pairs)]
        tokens, targets = [0] * length, [IGNORED] * length
        for n, (key, value) in enumerate(zip(keys, values, strict=True)):
            tokens[2 * n], tokens[2 * n + 1] = key, value
        free = list(range((length - 2 * pairs) // 2))
        for key, value in zip(keys, values, strict=True):
            place = random.choices(free, [(n + 1) ** -0.99 for n in free])[0]
            free.remove(place)
            tokens[2 * pairs + 2 * place], targets[2 * pairs + 2 * place] = key, value
        return tokens, targets

    return sample


def copying(length: int) -> Sample:
    word = [random.randrange(1, 9) for _ in range(8)]
    return [*word, *[0] * (length - 8), 9, *[0] * 7], [IGNORED] * length + word


def induction(length: int) -> Sample:
    tokens = [random.randrange(1, 17) for _ in range(length)]
    at = random.randrange(length - 1)
    tokens[at] = 17
    return [*tokens, 17], [IGNORED] * length + [tokens[at + 1]]


def nearest_neighbour(length: int) -> Sample:
    reference, best, label, tokens = random.randrange(64), 65, 0, []
    for _ in range(length // 2):
        point, mark = random.randrange(64), random.randrange(65, 73)
        distance = min((point - reference) % 64, (reference - point) % 64)
        if distance < best:
            best, label = distance, mark
        tokens += [point + 1, mark]
    return [reference + 1, *tokens, 0], [IGNORED] * (len(tokens) + 1) + [label]


LOOPS: dict[str, Callable[[int], Sample]] = {
    "parity": parity,
    "even-pairs": even_pairs,
    "cycle-navigation": cycle_navigation,
    "modular-arithmetic": modular_arithmetic,
    "modular-arithmetic-brackets": brackets,
    "solve-equation": solve_equation,
    "s3": word_problem(3),
    "s5": word_problem(5),
    "majority": majority,
    "majority-count": majority_count,
    "bucket-sort": rewriting(5, sorted),
    "missing-duplicate": missing_duplicate,
    "reverse-string": rewriting(2, lambda word: word[::-1]),
    "duplicate-string": rewriting(2, lambda word: word + word),
    "mqar-small": recall(8, 128),
    "mqar-16": recall(16, 8192),
    "copying": copying,
    "induction": induction,
    "nearest-neighbour": nearest_neighbour,
}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=1024)
    p.add_argument("--length", type=int, default=256)
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"name": "task-generators", **environment(arguments), "microseconds": {}}
    report |= {"batch": arguments.batch, "length": arguments.length}
    print(f"{'task':<28} {'here':>12} {'loop':>12} {'ratio':>7}   microseconds per string, medians")
    ratios, load = [], OtherLoad()
    for name, loop in LOOPS.items():
        task = get_task(name)
        length = int(task.lengths(arguments.length - 1, arguments.length)[-1])
        few = max(8, arguments.batch // 16)

        def looped(loop: Callable[[int], Sample] = loop, length: int = length, few: int = few) -> None:
            samples = [loop(length) for _ in range(few)]
            for part in zip(*samples, strict=True):
                torch.tensor(part)

        def made(task: Task = task, length: int = length) -> None:
            task.batch("train", range(arguments.batch), lengths=(length, length))

        rounds = [(timed(made), timed(looped)) for _ in range(arguments.repeats + 1)][1:]
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ours, theirs = ours / arguments.batch * 1e6, theirs / few * 1e6
        ratios.append(theirs / ours)
        report["microseconds"][name] = {"here": ours, "loop": theirs, "ratio": ratios[-1]}
        print(f"{name:<28} {ours:>12.2f} {theirs:>12.1f} {ratios[-1]:>7.0f}")
    report |= {"smallest_ratio": min(ratios), "geometric_mean": statistics.geometric_mean(ratios)}
    report |= disturbance(load.cores())
    warn("the task generators", report)
    print(f"smallest ratio {min(ratios):.0f}, geometric mean {report['geometric_mean']:.0f}")
    output = arguments.output or RESULTS / f"{report['date']}-task-generators.json"
    atomic_write_text(output, json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
