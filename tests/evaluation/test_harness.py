"""The adapter for lm-evaluation-harness: the numbers of ``transformers``, shared states, a local task."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from openxlstm.checkpoint import save_pretrained, train_bpe
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

pytestmark = pytest.mark.filterwarnings("default")  # of the harness and what it imports

with warnings.catch_warnings():
    warnings.simplefilter("default")
    from lm_eval.api.instance import Instance

    from openxlstm.evaluation.harness import OpenXLSTM, _common

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "wizards",
    "box",
    "with",
    "jugs",
    "of",
    "liquid",
]


def sentence(words: random.Random, count: int) -> str:
    return " ".join(words.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An xLSTMLarge with random weights that ``transformers`` reads too."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("harness") / "model"
    tokenizer = train_bpe([sentence(random.Random(0), 2000)], 300)
    config = xLSTMLargeConfig(embedding_dim=64, num_heads=2, num_blocks=2, vocab_size=300)
    model = xLSTMLarge(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("igate_preact.bias"):
                parameter.fill_(-1.0)  # so that the memory matters
            elif parameter.ndim == 2:
                parameter.mul_(3)
    save_pretrained(model, directory, tokenizer=tokenizer)
    return directory


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, values, n) for n, values in enumerate(arguments)]


def questions(count: int, context: int) -> list[tuple[str, str]]:
    """(context, answer): four answers for each question, all questions after the same examples."""
    words = random.Random(1)
    examples = sentence(words, context)
    found: list[tuple[str, str]] = []
    for _ in range(count):
        question = f"{examples}\nQ: {sentence(words, 8)}\nA:"
        found += [(question, f" {sentence(words, length)}") for length in (1, 2, 4, 3)]
    return found


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, max_length=2000)


def test_the_numbers_of_transformers(checkpoint: Path, theirs: Any) -> None:
    ours = OpenXLSTM(str(checkpoint), device="cpu")
    pairs = [
        *questions(3, 40),
        ("", "the quick brown"),
        ("a trailing space ", "fox"),
        ("Q", " seven wizards"),
    ]
    requests = instances("loglikelihood", list(pairs))
    for a, b in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]
    texts = instances("loglikelihood_rolling", [(sentence(random.Random(3), 60),), ("fox",)])
    rolled = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, abs=1e-4, rel=1e-6)


def test_generation_stops_where_it_is_told(checkpoint: Path) -> None:
    ours = OpenXLSTM(str(checkpoint), device="cpu")
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (text,) = ours.generate_until(instances("generate_until", [("the quick brown fox", free)]))
    assert len(text) > 4
    tokens, state = torch.tensor([ours.tok_encode("the quick brown fox")]), None
    with torch.no_grad():
        for _ in range(12):
            logits, state = ours.model(tokens[:, -1:] if state else tokens, state, return_state=True)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert ours.tokenizer.decode(tokens[0].tolist()) == "the quick brown fox" + text
    stopped = {**free, "until": text[3]}
    (part,) = ours.generate_until(instances("generate_until", [("the quick brown fox", stopped)]))
    assert part == text[: text.index(text[3])]


def test_windows_of_limited_length_as_in_transformers(checkpoint: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    limited = {"device": "cpu", "max_length": 24}
    ours, theirs = OpenXLSTM(str(checkpoint), **limited), HFLM(pretrained=str(checkpoint), **limited)
    texts = instances("loglikelihood_rolling", [(sentence(random.Random(4), 60),)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4, rel=1e-6
    )
    requests = instances("loglikelihood", list(questions(2, 60)))
    results = zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    )
    for a, b in results:
        assert a[0] == pytest.approx(b[0], abs=1e-4)


def test_shared_beginnings_are_read_once(checkpoint: Path) -> None:
    ours = OpenXLSTM(str(checkpoint), device="cpu")
    pairs = questions(5, 200)
    shared = ours.loglikelihood(instances("loglikelihood", list(pairs)))
    assert ours.tokens_asked > 8 * ours.tokens_read
    random.Random(0).shuffle(pairs)
    alone: dict[tuple[str, str], float] = {}
    for pair in pairs:
        ((value, _),) = ours.loglikelihood(instances("loglikelihood", [pair]))
        alone[pair] = value
    for pair, (value, _) in zip(questions(5, 200), shared, strict=True):
        assert value == pytest.approx(alone[pair], abs=1e-4)
    assert (_common([1, 2, 3], [1, 2, 4]), _common([1], [1, 2]), _common([], [1])) == (2, 1, 0)


def test_mistakes(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"name the model: --model_args pretrained=DIRECTORY"):
        OpenXLSTM()
    ours = OpenXLSTM(str(checkpoint), device="cpu", max_length=4)
    with pytest.raises(ValueError, match=r"an answer has \d+ tokens, more than max_length=4; raise it"):
        ours.loglikelihood(instances("loglikelihood", [("the", " " + sentence(random.Random(2), 20))]))


def test_a_local_task_through_the_command_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openxlstm.cli.main import main

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = random.Random(5)
    lines = [
        {"question": sentence(words, 8), "answers": [sentence(words, 2) for _ in range(3)], "label": n % 3}
        for n in range(6)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks" / "local_choice.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/data.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    arguments = ["--tasks", "local_choice", "--include_path", str(tmp_path / "tasks")]
    arguments += [
        "--model_args",
        f"pretrained={checkpoint}",
        "--output_path",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(["eval", "harness", *arguments]) == 0
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]["local_choice"]
    assert 0 <= results["acc,none"] <= 1
