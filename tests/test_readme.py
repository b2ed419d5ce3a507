"""The README and the guide are true: every Python block and every command line runs, every link exists."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from openxlstm.checkpoint import save_pretrained, train_bpe
from openxlstm.cli import data as data_command
from openxlstm.cli.main import COMMANDS, main
from openxlstm.data import Texts
from openxlstm.models import build_model

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = [
    (path, number, code)
    for path in DOCUMENTS
    for number, code in enumerate(blocks(path, "python"))
    if path.name != "architecture.md"  # its one block is an excerpt
]


@pytest.fixture
def demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a small untrained model where the demo would have left a trained one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_bpe(["def main():\n    pass\n", "class Parser:\n"], 257)
    values = {"model_type": "xlstm_lm", "embedding_dim": 32, "num_blocks": 2, "vocab_size": 257}
    save_pretrained(
        build_model({**values, "slstm_at": [1]}), tmp_path / "runs/demo/model", tokenizer=tokenizer
    )
    return tmp_path


@pytest.mark.parametrize(("path", "number", "code"), PYTHON, ids=lambda value: getattr(value, "stem", None))
def test_python_block(demo_model: Path, path: Path, number: int, code: str) -> None:
    exec(compile(code, f"{path.name} block {number}", "exec"), {"__name__": "readme"})


def test_readme_has_its_parts() -> None:
    text = (ROOT / "README.md").read_text()
    for part in (
        "make demo",
        "make test",
        "docs/architecture.svg",
        "## Limits",
        "## Platforms",
        "| transformers |",
    ):
        assert part in text, part
    assert len(blocks(ROOT / "README.md", "python")) >= 5
    assert max(len(code.splitlines()) for code in blocks(ROOT / "README.md", "python")) <= 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_exist(path: Path) -> None:
    for line in "\n".join(blocks(path, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "openxlstm":
            assert words[1] in COMMANDS, line
        elif words and words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


def test_readme_command_lines_run(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the README in order, with small data and few steps."""
    texts = [f"import os\n\ndef function_{n}(x):\n    return x + {n}\n" * 4 for n in range(60)]
    monkeypatch.setattr(data_command, "python_standard_library", lambda: Texts(texts))
    os.symlink(ROOT / "recipes", "recipes")
    (section,) = [code for code in blocks(ROOT / "README.md", "bash") if "openxlstm data" in code]
    small = ["--model.embedding_dim", "32", "--data.context_length", "16", "--train.progress", "false"]
    for line in section.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":
            assert words[-2] == "--train.steps" or "--train.steps" in words
            steps = words.index("--train.steps") + 1
            words[steps] = str(int(words[steps]) // 500)
            words += [*small, "--train.warmup_steps", "0", "--train.validation_every", "0"]
        assert main(words) == 0, line
    assert Path("runs/theirs").is_dir()
