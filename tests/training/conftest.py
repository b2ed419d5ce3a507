"""One tiny prepared corpus for all training tests, and the helpers of ``toy.py`` as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openxlstm.training import Trainer, read_log
from openxlstm.training.logging import TIMINGS


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy.py``."""
    spec = importlib.util.spec_from_file_location("training_toy", Path(__file__).with_name("toy.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared corpus."""
    directory = tmp_path_factory.mktemp("corpus")
    toy.prepare_data(directory)
    return directory


@pytest.fixture
def make_trainer(toy: ModuleType, data: Path) -> Callable[..., Trainer]:
    """``make_trainer(output, **settings)``."""
    return lambda output, **settings: toy.make_trainer(data, output, **settings)


@pytest.fixture(scope="session")
def log_of() -> Callable[[Path], list[dict[str, Any]]]:
    """A run's log without the start record and without what no two runs share."""

    def read(output: Path) -> list[dict[str, Any]]:
        records = read_log(output / "log.jsonl")
        assert records[0]["kind"] == "start"
        return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records[1:]]

    return read
