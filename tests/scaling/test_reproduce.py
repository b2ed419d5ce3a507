"""The reproduction end to end: with all references (slow), with some of the parametric ones, with none."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest

from openxlstm.cli.main import main


def text_of(page: str) -> str:
    page = re.sub(r"</t[dh]>", "|", re.sub(r"<img[^>]*>", "", page))
    return re.sub(r"<[^>]+>", " ", page)


def check_page(path: Path, figures: int) -> str:
    page = path.read_text()
    assert page.count("data:image/png;base64,") == figures
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing to load
    text = text_of(page)
    assert re.search(r"parameters\|\s+562\|\s+0\|", text)
    for part in ("IsoFLOP profiles", "Optimal size", "Over-training", "Loss against compute", "A prediction"):
        assert part in text
    return text


def test_reproduction_with_a_few_parametric_fits(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(published, data)
    data.chmod(0o755)
    for file in data.iterdir():
        file.chmod(0o644)
    fits = pd.read_csv(data / "ref_parametric_fits.csv")
    fits[fits["raw_data_available"]].iloc[[20, 26, 90]].to_csv(data / "ref_parametric_fits.csv", index=False)
    assert main(["scaling", "reproduce", str(data), "--output", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"FLOPs of runs, relative +562 +\d\.\de-\d\d  1e-09\n", printed)
    assert re.search(r"exponents of N\*\(C\) and D\*\(C\), absolute +6 ", printed)
    text = check_page(tmp_path / "report.html", 6)
    assert "| published optima|" in text  # where runs are missing, it says so
    assert "| published parabolas in N, refitted in D|" in text
    assert text.count("tokens|") >= 6  # both families at three contexts
    assert "1 fit: the published point has not converged" in text
    assert "Inference times" in text


@pytest.mark.slow
def test_reproduction_from_the_runs_alone(published: Path, tmp_path: Path) -> None:
    shutil.copy(published / "training_runs.csv", tmp_path / "training_runs.csv")
    assert main(["scaling", "reproduce", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0
    assert "neither complete runs nor" in check_page(tmp_path / "report.html", 4)


@pytest.mark.slow
def test_everything_in_two_minutes(published: Path, tmp_path: Path) -> None:
    start = time.process_time()
    assert main(["scaling", "reproduce", str(published), "--output", str(tmp_path / "report.html")]) == 0
    assert time.process_time() - start < 120
    assert "143 of 208 published fits" in check_page(tmp_path / "report.html", 6)


def test_directories_without_the_measurements(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["scaling", "reproduce", str(tmp_path / "absent")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["scaling", "reproduce", str(tmp_path)]) == 1
    assert "neither training_runs.parquet nor training_runs.csv" in capsys.readouterr().err
    pd.DataFrame({"model": ["a"], "loss": [1.0]}).to_csv(tmp_path / "training_runs.csv", index=False)
    assert main(["scaling", "reproduce", str(tmp_path)]) == 2
    assert "lacks the columns" in capsys.readouterr().err


def test_references_without_their_columns_are_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(published / "training_runs.csv", tmp_path / "training_runs.csv")
    reference = pd.read_csv(published / "ref_parametric_fits.csv").drop(columns="token_param_range")
    reference.to_csv(tmp_path / "ref_parametric_fits.csv", index=False)
    assert main(["scaling", "reproduce", str(tmp_path)]) == 2
    assert "ref_parametric_fits.csv' lacks the columns token_param_range" in capsys.readouterr().err
