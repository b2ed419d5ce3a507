"""Independent answers: plain Python on one string at a time, written from the definitions of the tasks."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

IGNORED = -100


def strip(tokens: Sequence[int]) -> list[int]:
    return [t for t in tokens if t != 0]


def asked(tokens: Sequence[int], targets: Sequence[int]) -> list[tuple[int, int]]:
    """(position, target) wherever something is asked."""
    return [(n, t) for n, t in enumerate(targets) if t != IGNORED]


def parity(word: list[int]) -> int:
    return 1 + word.count(2) % 2


def even_pairs(word: list[int]) -> int:
    changes = sum(pair in ((1, 2), (2, 1)) for pair in itertools.pairwise(word))
    return 2 if changes % 2 == 0 else 1


def cycle_navigation(word: list[int]) -> int:
    place = 0
    for token in word:
        place = (place + {1: 0, 2: 1, 3: -1}[token]) % 5
    return 4 + place


def group(size: int) -> Callable[[list[int]], int]:
    elements = list(itertools.permutations(range(size)))

    def product(word: list[int]) -> int:
        things = list(range(size))
        for token in word:
            things = [elements[token - 1][thing] for thing in things]
        return 1 + elements.index(tuple(things))

    return product


def majority(word: list[int]) -> int:
    (first, count), *rest = Counter(word).most_common()
    return IGNORED if rest and rest[0][1] == count else first


def majority_count(word: list[int]) -> int:
    return 2 + Counter(word).most_common(1)[0][1]


SYMBOLS = {**{n: str(n - 1) for n in range(1, 6)}, 6: "+", 7: "-", 8: "*", 10: "(", 11: ")"}


def value(word: list[int]) -> int:
    text = "".join(SYMBOLS[token] for token in word)
    return 1 + eval(re.sub(r"(\d)", r"int(\1)", text)) % 5  # Python's own precedence is the definition


def arithmetic(word: list[int]) -> int:
    return value(word) if word[-1] <= 5 else IGNORED


def expression_value(word: list[int]) -> int:
    assert word[-1] == 9
    return value(word[:-1])


def solution(word: list[int]) -> int:
    at, right = word.index(12), word[-1]
    assert word[-2] == 9
    (found,) = [x for x in range(1, 6) if value([*word[:at], x, *word[at + 1 : -2]]) == right]
    return found


def hidden(word: list[int]) -> int:
    at, half = word.index(9), len(word) // 2
    answer = word[(at + half) % len(word)]
    whole = [*word[:at], answer, *word[at + 1 :]]
    assert whole[:half] == whole[half:]
    return answer


def induction(word: list[int]) -> int:
    assert word[-1] == 17
    return word[word.index(17) + 1]


def nearest(word: list[int]) -> int:
    reference, rest = word[0], word[1:]
    distances = [min((p - reference) % 64, (reference - p) % 64) for p in rest[::2]]
    return rest[1::2][distances.index(min(distances))]


PREFIX: dict[str, Callable[[list[int]], int]] = {
    "parity": parity,
    "even-pairs": even_pairs,
    "cycle-navigation": cycle_navigation,
    "modular-arithmetic": arithmetic,
    "s3": group(3),
    "s5": group(5),
    "majority": majority,
    "majority-count": majority_count,
}
"""Answer for a prefix of the string."""
LAST: dict[str, Callable[[list[int]], int]] = {
    **PREFIX,
    "modular-arithmetic": expression_value,
    "modular-arithmetic-brackets": expression_value,
    "solve-equation": solution,
    "missing-duplicate": hidden,
    "induction": induction,
    "nearest-neighbour": nearest,
}
"""Answer for what stands before the pad token where it is asked."""


def rewriting(word: list[int], name: str) -> list[int]:
    return {
        "bucket-sort": sorted,
        "reverse-string": lambda w: w[::-1],
        "duplicate-string": lambda w: w + w,
        "copying": lambda w: w[:8],
    }[name](word)


def written(tokens: list[int], pairs: int) -> dict[int, int]:
    """Value under each key, from the pairs at the beginning."""
    memory = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    assert len(memory) == pairs
    return memory
