"""Long prompts: their length, their needles, their determinism, and the scorer."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from openxlstm.checkpoint import Tokenizer, byte_tokenizer, train_bpe
from openxlstm.evaluation.long_context import LONG_TASKS, get_long_task, make_prompt, run_long_task, score
from openxlstm.models import build_model

TEXT = "".join(f"Sentence number {n} talks about the weather of day {n % 7}. " for n in range(400))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(
        [TEXT, "bada kelo mipu 1 2 3 4 5 6 7 8 9 0. VAR Question Answer magic number words"], 320
    )


@pytest.mark.parametrize("length", [1000, 1024, 4096, 16_384])
@pytest.mark.parametrize("name", sorted(LONG_TASKS))
def test_length_is_within_two_percent(tokenizer: Tokenizer, name: str, length: int) -> None:
    prompt = make_prompt(name, tokenizer, TEXT, length, index=1)
    assert prompt.tokens == len(tokenizer.encode(prompt.text))
    assert abs(prompt.tokens - length) <= 0.02 * length
    assert prompt == make_prompt(name, tokenizer, TEXT, length, index=1)
    assert prompt.text != make_prompt(name, tokenizer, TEXT, length, index=2).text
    assert prompt.text != make_prompt(name, tokenizer, TEXT, length, index=1, seed=1).text


@pytest.mark.parametrize(("keys", "name"), [(1, "needle"), (4, "needle-multikey"), (4, "needle-multiquery")])
def test_needles_are_there_once(tokenizer: Tokenizer, name: str, keys: int) -> None:
    prompt = make_prompt(name, tokenizer, TEXT, 2000)
    found = dict(re.findall(r" The magic number of (\w+) is (\d{7})\.", prompt.text))
    assert len(found) == keys
    asked = re.search(r"does the text give for ([\w, ]+)\?", prompt.text)
    assert asked
    assert [found[key] for key in asked[1].split(", ")] == list(prompt.answers)


def test_values_of_one_key(tokenizer: Tokenizer) -> None:
    prompt = make_prompt("needle-multivalue", tokenizer, TEXT, 2000)
    found = re.findall(r"magic number of (\w+) is (\d{7})\.", prompt.text)
    assert len({key for key, _ in found}) == 1
    assert sorted(value for _, value in found) == sorted(prompt.answers)


def test_variables_follow_the_chain(tokenizer: Tokenizer) -> None:
    prompt = make_prompt("variable-tracking", tokenizer, TEXT, 3000)
    values: dict[str, str] = {}
    for name, source, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d{7}))\.", prompt.text):
        values[name] = values[source] if source else number  # in the order of the text
    wanted = re.search(r"have the value (\d+)\?", prompt.text)
    assert wanted
    assert sorted(name for name, value in values.items() if value == wanted[1]) == sorted(prompt.answers)
    assert len(values) == 10


@pytest.mark.parametrize("length", [1000, 8000])
@pytest.mark.parametrize("name", ["common-words", "frequent-words"])
def test_the_most_frequent_words_are_the_answer(tokenizer: Tokenizer, name: str, length: int) -> None:
    prompt = make_prompt(name, tokenizer, TEXT, length)
    counts = Counter(re.findall(r"\d+\. (\w+)", prompt.text.split("\n")[1]))
    (*top, last), following = (
        counts.most_common(len(prompt.answers)),
        counts.most_common()[len(prompt.answers)],
    )
    assert {word for word, _ in [*top, last]} == set(prompt.answers)
    assert last[1] > following[1]


def test_a_short_text_is_repeated() -> None:
    prompt = make_prompt("needle", byte_tokenizer(), "Only this. ", 5000)
    assert abs(prompt.tokens - 5000) <= 100
    assert prompt.text.count("Only this.") > 300


def test_scorer() -> None:
    assert score("It is 1234567, or 7654321.", ["1234567", "7654321"]) == 1
    assert score("1234567", ["1234567", "7654321"]) == 0.5
    assert score("BADAKE and mipulo", ["badake", "Mipulo", "x9"]) == pytest.approx(2 / 3)
    assert score("", ["a"]) == 0
    with pytest.raises(ValueError, match="nothing to score"):
        score("a", [])


def test_a_model_answers() -> None:
    values = {"model_type": "xlstm_lm", "embedding_dim": 32, "num_blocks": 1, "vocab_size": 257}
    tokenizer = byte_tokenizer()
    found = run_long_task(build_model(values), tokenizer, "needle", 1000, TEXT, samples=2)
    assert (found.length, len(found.tokens), len(found.answers)) == (1000, 2, 2)
    assert 0 <= found.score <= 1

    prompt = make_prompt("needle-multivalue", tokenizer, TEXT, 1500)
    assert score(" ".join(re.findall(r"is (\d{7})\.", prompt.text)), prompt.answers) == 1


def test_mistakes(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"unknown long-context task 'needel'\. Did you mean 'needle'"):
        get_long_task("needel")
    with pytest.raises(
        ValueError, match="length 20 is too short for task 'needle': its question alone takes"
    ):
        make_prompt("needle", tokenizer, TEXT, 20)
    with pytest.raises(ValueError, match="the filler text is empty"):
        make_prompt("needle", tokenizer, " \n", 1000)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        run_long_task(None, tokenizer, "needle", 1000, TEXT, samples=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG_TASKS))
def test_a_million_tokens(tokenizer: Tokenizer, name: str) -> None:
    prompt = make_prompt(name, tokenizer, TEXT, 1_000_000)
    assert abs(prompt.tokens - 1_000_000) <= 20_000
