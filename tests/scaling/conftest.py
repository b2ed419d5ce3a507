"""The published measurements, where they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("scipy")
PUBLISHED = Path(__file__).parents[3] / "shared" / "scaling"


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of the published measurements; they are not part of the repository."""
    if not (PUBLISHED / "training_runs.parquet").is_file():
        pytest.skip("the published scaling measurements are not part of the repository")
    return PUBLISHED


@pytest.fixture(scope="session")
def runs(published: Path) -> Any:
    """The complete published training runs."""
    from openxlstm.scaling import read_runs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_runs(published / "training_runs.parquet")
