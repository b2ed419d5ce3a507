"""Long-context tasks in the manner of RULER (Hsieh et al., arXiv 2404.06654), from local text, without
downloads.

Needles in a haystack (one; one among several keys; several values of a key; several keys asked), variable
tracking, common words and frequent words. A prompt has the requested number of tokens, within 2 %, and is a
function of (seed, task, length, index). The score of an answer is the share of the expected strings that it
contains.

Prompts are read with the state carried from piece to piece, so 1,000,000 tokens need no more memory than
1,000.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from openxlstm.checkpoint import Tokenizer
from openxlstm.config import nearest_name
from openxlstm.inference import Generator

TOLERANCE = 0.02
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


class Prompt(NamedTuple):
    """A question about a long text."""

    text: str
    answers: tuple[str, ...]
    """Strings that a right answer contains."""
    tokens: int
    """Its length, the beginning-of-sequence token included."""


class Parts(NamedTuple):
    """A prompt whose filler is still to be chosen."""

    build: Callable[[int], str]
    """Amount of filler (characters or words) to the text of the prompt."""
    answers: tuple[str, ...]


@dataclass(frozen=True)
class LongTask:
    """A task."""

    name: str
    summary: str
    make: Callable[[random.Random, str], Parts]
    """(random numbers, filler text) -> the parts."""
    answer_tokens: int = 64
    """Tokens that an answer may have."""


def word(numbers: random.Random) -> str:
    """A made-up word of three syllables."""
    return "".join(numbers.choices(SYLLABLES, k=3))


def words(numbers: random.Random, count: int) -> list[str]:
    """Different made-up words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(numbers)] = None
    return list(found)


def magic(numbers: random.Random) -> str:
    """A number of seven digits."""
    return str(numbers.randrange(10**6, 10**7))


# ---------------------------------------------------------------------- tasks


def haystack(text: str, size: int, start: int, lines: Sequence[str], depths: Sequence[float]) -> str:
    """``size`` characters of ``text``, read in a circle from ``start``, with ``lines`` put in at relative
    depths.

    Lines go in at the next end of a word.
    """
    turned = text[start:] + text[:start]
    hay = (turned * (size // len(turned) + 1))[:size]
    pieces, last = [], 0
    for depth, line in sorted(zip(depths, lines, strict=True)):
        at = max(last, int(depth * len(hay)))
        space = hay.find(" ", at)
        at = len(hay) if space < 0 else space
        pieces += [hay[last:at], f" {line}"]
        last = at
    return "".join([*pieces, hay[last:]])


def needles(keys: int, values: int, asked: int) -> Callable[[random.Random, str], Parts]:
    """Needle in a haystack: ``keys`` keys with ``values`` numbers each, of which ``asked`` are asked for."""

    def make(numbers: random.Random, text: str) -> Parts:
        names = words(numbers, keys)
        table = {name: [magic(numbers) for _ in range(values)] for name in names}
        lines = [f"The magic number of {name} is {n}." for name, found in table.items() for n in found]
        numbers.shuffle(lines)
        depths, start = [numbers.random() for _ in lines], numbers.randrange(len(text))
        wanted = numbers.sample(names, asked)
        listed = ", ".join(wanted)
        plural = "numbers" if values * asked > 1 else "number"

        def build(size: int) -> str:
            hay = haystack(text, size, start, lines, depths)
            return (
                f"Magic numbers are hidden in the following text. Remember them.\n{hay}\n"
                f"Question: which magic {plural} does the text give for {listed}?\n"
                f"Answer: the magic {plural} of {listed}:"
            )

        return Parts(build, tuple(n for name in wanted for n in table[name]))

    return make


def variable_tracking(numbers: random.Random, text: str) -> Parts:
    """A chain of five variables that get the same value, and a second chain to distract."""
    names = [name.upper() for name in words(numbers, 10)]
    value, other = magic(numbers), magic(numbers)
    lines: list[str] = []
    for chain, first in ((names[:5], value), (names[5:], other)):
        lines.append(f"VAR {chain[0]} = {first}.")
        lines += [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
    first_half, second_half = (sorted(numbers.random() for _ in range(5)) for _ in range(2))
    depths, start = [*first_half, *second_half], numbers.randrange(len(text))

    def build(size: int) -> str:
        hay = haystack(text, size, start, lines, depths)
        return (
            f"Follow the assignments of variables hidden in the following text.\n{hay}\n"
            f"Question: which five variables have the value {value}?\n"
            f"Answer: the variables with the value {value}:"
        )

    return Parts(build, tuple(names[:5]))


def _counted(listing: list[str], question: str) -> str:
    numbered = " ".join(f"{n}. {name}" for n, name in enumerate(listing, 1))
    return f"Below is a numbered list of words.\n{numbered}\nQuestion: {question}\nAnswer: the words are:"


def common_words(numbers: random.Random, text: str) -> Parts:
    """Ten words occur 30 times each (fewer in short lists), the many others three times (once)."""
    frequent, seed = words(numbers, 10), numbers.random()

    def build(size: int) -> str:
        inner = random.Random(seed)
        repeats = min(max(3, size // 30), 30)
        each = 3 if repeats == 30 else 1
        common = frequent * repeats
        count = max(0, size - len(common)) // each
        rare = [name for name in words(inner, count + 10) if name not in frequent][:count]
        listing = [*common, *(rare * each)]
        inner.shuffle(listing)
        return _counted(listing, "which ten words occur most often?")

    return Parts(build, tuple(frequent))


def frequent_words(numbers: random.Random, text: str) -> Parts:
    """Words occur with frequencies ~ 1 / rank ** 2; the first three are asked for."""
    vocabulary, seed = words(numbers, 500), numbers.random()
    weights = [1 / rank**2 for rank in range(1, len(vocabulary) + 1)]
    total = sum(weights)

    def build(size: int) -> str:
        inner = random.Random(seed)
        counts = [round(size * weight / total) for weight in weights]  # exact, so that the answer is certain
        counts[:3] = [counts[0] + 6, counts[1] + 4, counts[2] + 2]
        listing = [name for name, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        inner.shuffle(listing)
        return _counted(listing, "which three words occur most often?")

    return Parts(build, tuple(vocabulary[:3]))


LONG_TASKS: dict[str, LongTask] = {
    task.name: task
    for task in (
        LongTask("needle", "one magic number in the text", needles(1, 1, 1), 24),
        LongTask("needle-multikey", "one of four keys is asked for", needles(4, 1, 1), 24),
        LongTask("needle-multivalue", "all four values of one key", needles(1, 4, 1), 96),
        LongTask("needle-multiquery", "four keys are asked for", needles(4, 1, 4), 96),
        LongTask("variable-tracking", "which variables have a value, over four hops", variable_tracking, 96),
        LongTask("common-words", "the ten most common words of a list", common_words, 128),
        LongTask("frequent-words", "the three most frequent words of a list", frequent_words, 48),
    )
}
"""Name to task."""


def get_long_task(name: str) -> LongTask:
    """The task of that name.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    key = name.lower().replace("_", "-")
    if key not in LONG_TASKS:
        hint = nearest_name(key, LONG_TASKS)
        raise ValueError(f"unknown long-context task {name!r}.{hint} Tasks: {', '.join(LONG_TASKS)}")
    return LONG_TASKS[key]


# ---------------------------------------------------------------------- prompts and scores


def make_prompt(
    task: str, tokenizer: Tokenizer, text: str, length: int, *, index: int = 0, seed: int = 0
) -> Prompt:
    """A prompt of ``length`` tokens, within 2 %.

    Args:
        task: name of the task.
        tokenizer: counts the tokens.
        text: filler, any text; repeated if it is too short.
        length: tokens, the beginning-of-sequence token included.
        index, seed: which of the many prompts.

    Raises:
        ValueError: an unknown task, no filler, or a length too short for the task.
    """
    kind = get_long_task(task)
    if not text.strip():
        raise ValueError("the filler text is empty; give some text")
    parts = kind.make(random.Random(f"{seed}/{kind.name}/{length}/{index}"), text)

    def counted(size: int) -> tuple[str, int]:
        made = parts.build(size)
        return made, len(tokenizer.encode(made))

    low, (made, tokens) = 0, counted(0)
    if tokens > length * (1 + TOLERANCE):
        raise ValueError(
            f"length {length} is too short for task '{kind.name}': its question alone takes {tokens} tokens"
        )
    high, high_tokens, low_tokens = None, 0, tokens
    best = abs(tokens - length), made, tokens
    size = max(64, length // 4)
    for _ in range(40):
        made, tokens = counted(size)
        best = min(best, (abs(tokens - length), made, tokens), key=lambda entry: entry[0])
        if best[0] <= TOLERANCE / 4 * length:
            break
        if tokens < length:
            low, low_tokens = size, tokens
        else:
            high, high_tokens = size, tokens
        if high is None:
            size = max(size + 1, int(size * min(4.0, length / max(tokens, 1))))
        else:
            share = (length - low_tokens) / max(high_tokens - low_tokens, 1)
            size = low + max(1, int((high - low) * min(max(share, 0.05), 0.95)))
            if high - low <= 1:
                break
    if best[0] > TOLERANCE * length:
        raise ValueError(
            f"cannot make a prompt of {length} tokens for task '{kind.name}' from this text: the nearest has "
            f"{best[2]}; use a longer length"
        )
    return Prompt(best[1], parts.answers, best[2])


def score(answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that ``answer`` contains, upper and lower case being the same.

    Raises:
        ValueError: nothing is expected.
    """
    if not expected:
        raise ValueError("there is nothing to score against")
    lowered = answer.lower()
    return sum(text.lower() in lowered for text in expected) / len(expected)


class LongScore(NamedTuple):
    """How a model did on one task at one length."""

    task: str
    length: int
    score: float
    """Mean over the prompts."""
    tokens: tuple[int, ...]
    """Length of each prompt."""
    answers: tuple[str, ...]
    """What the model wrote."""


def run_long_task(
    model: Any,
    tokenizer: Tokenizer,
    task: str,
    length: int,
    text: str,
    *,
    samples: int = 5,
    seed: int = 0,
) -> LongScore:
    """Let a model answer ``samples`` prompts greedily, and score it.

    Raises:
        ValueError: as :func:`make_prompt`, or no samples.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    generator = Generator(model, tokenizer)
    prompts = [make_prompt(task, tokenizer, text, length, index=n, seed=seed) for n in range(samples)]
    limit = get_long_task(task).answer_tokens
    answers = [generator.generate(p.text, max_new_tokens=limit, temperature=0.0) for p in prompts]
    scores = [score(answer, prompt.answers) for answer, prompt in zip(answers, prompts, strict=True)]
    return LongScore(
        task, length, sum(scores) / len(scores), tuple(p.tokens for p in prompts), tuple(answers)
    )
