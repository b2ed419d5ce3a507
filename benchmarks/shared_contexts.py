"""lm-evaluation-harness on questions that share long contexts: this library's adapter beside `transformers`.

    python benchmarks/shared_contexts.py [--questions 4] [--words 500]

Both sides score the same requests with the same weights: four answers to each question, all questions after
the same examples. The adapter reads the examples once and goes on from the state; `transformers` reads them
again for every question, and once per answer where answers are longer than a token.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import Variant, parser, run, with_allocator
from openxlstm.checkpoint import save_pretrained, train_bpe
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "box",
    "with", "jugs", "of", "liquid",
)  # fmt: skip


def sentence(words: random.Random, count: int) -> str:
    return " ".join(words.choice(WORDS) for _ in range(count))


def requests(questions: int, context: int) -> list[Any]:
    from lm_eval.api.instance import Instance

    words = random.Random(1)
    examples = sentence(words, context)
    found: list[Any] = []
    for _ in range(questions):
        question = f"{examples}\nQ: {sentence(words, 8)}\nA:"
        for length in (1, 2, 4, 3):
            values = (question, f" {sentence(words, length)}")
            found.append(Instance("loglikelihood", {}, values, len(found)))
    return found


def checkpoint(directory: Path) -> Path:
    """An xLSTMLarge with random weights that both sides read."""
    torch.manual_seed(0)
    tokenizer = train_bpe([sentence(random.Random(0), 2000)], 300)
    config = xLSTMLargeConfig(embedding_dim=128, num_heads=2, num_blocks=2, vocab_size=300)
    save_pretrained(xLSTMLarge(config), directory, tokenizer=tokenizer)
    return directory


def variant(name: str, load: Callable[[], Any], questions: int, words: int) -> Variant:
    def prepare() -> Callable[[], Any]:
        model, asked = load(), requests(questions, words)
        return lambda: model.loglikelihood(asked, disable_tqdm=True)

    return Variant(name, prepare)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--questions", type=int, default=4)
    p.add_argument("--words", type=int, default=500, help="of the examples that all questions share")
    p.set_defaults(repeats=3)
    arguments = p.parse_args()
    with_allocator(arguments)
    size = arguments.questions, arguments.words
    with tempfile.TemporaryDirectory() as directory:
        path = str(checkpoint(Path(directory) / "model"))

        def ours() -> Any:
            from openxlstm.evaluation.harness import OpenXLSTM

            return OpenXLSTM(path, device="cpu")

        def theirs() -> Any:
            from lm_eval.models.huggingface import HFLM

            return HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=4, max_length=4096)

        label = "harness, four answers to each of {} questions after {} words".format(*size)
        variants = [
            variant("openxlstm", ours, *size),
            variant("transformers through the harness", theirs, *size),
        ]
        run("shared-contexts", {label: variants}, arguments, peer="transformers", ours="openxlstm")


if __name__ == "__main__":
    main()
