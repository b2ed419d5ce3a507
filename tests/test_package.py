"""The package as a whole: its public names, what importing it costs, and a wheel that works by itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import openxlstm

ROOT = Path(__file__).parent.parent

PUBLIC = [
    "Generator", "__version__", "checkpoint", "config", "data", "evaluation", "inference", "layers",
    "load_pretrained", "models", "ops", "runtime", "save_pretrained", "scaling", "state", "training",
]  # fmt: skip


def test_public_names_are_frozen() -> None:
    assert sorted(openxlstm.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(openxlstm))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str) -> None:
    assert getattr(openxlstm, name) is not None


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_pretrain'"):
        openxlstm.load_pretrain  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "module",
    ["checkpoint", "data", "evaluation", "inference", "layers", "models", "ops", "scaling", "training"],
)
def test_every_exported_name_exists(module: str) -> None:
    package = importlib.import_module(f"openxlstm.{module}")
    assert package.__all__, f"openxlstm.{module} exports nothing"
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "openxlstm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert openxlstm.__version__ in result.stdout


def imported_by(statement: str) -> set[str]:
    program = f"{statement}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(result.stdout)}


OPTIONAL = {"transformers", "matplotlib", "tensorboard", "huggingface_hub", "tyro", "scipy", "triton"}


def test_import_is_cheap() -> None:
    assert not imported_by("import openxlstm") & ({"torch", "numpy"} | OPTIONAL)


def test_library_does_not_import_optional_packages() -> None:
    statement = (
        "import openxlstm; openxlstm.load_pretrained, openxlstm.Generator, openxlstm.models, "
        "openxlstm.training, openxlstm.data"
    )
    assert not imported_by(statement) & {"transformers", "matplotlib", "tensorboard", "scipy"}


def test_everything_costs_under_a_second_beyond_torch() -> None:
    program = (
        "import time, torch, numpy, safetensors.torch, tokenizers, tqdm\nstart = time.process_time()\n"
        "import openxlstm as x\nx.load_pretrained, x.Generator, x.training, x.data\n"
        "print(time.process_time() - start)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.0


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment(tmp_path: Path) -> None:
    """Build the wheel, install only it, and lend it this environment's dependencies by path."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", *options, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("openxlstm-*.whl")
    venv.create(tmp_path / "empty", with_pip=False)
    scripts = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    subprocess.run([*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
    assert (Path(target) / "openxlstm" / "py.typed").is_file()

    command = scripts / "openxlstm"
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == f"openxlstm {openxlstm.__version__}"

    dependencies = importlib.import_module("sysconfig").get_path("purelib")
    environment = os.environ | {"PYTHONPATH": dependencies}
    program = (
        "import openxlstm, torch\nfrom openxlstm.models import xLSTMLarge, xLSTMLargeConfig\n"
        f"assert openxlstm.__file__.startswith({target!r}), openxlstm.__file__\n"
        "config = xLSTMLargeConfig(embedding_dim=64, num_heads=2, num_blocks=1, vocab_size=32)\n"
        "print(tuple(xLSTMLarge(config)(torch.zeros(1, 5, dtype=torch.long)).shape))"
    )
    result = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert result.stdout.strip() == "(1, 5, 32)"
