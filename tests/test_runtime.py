"""The machine module: names to devices and types, seeds, atomic files, measured limits, the report."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from openxlstm import runtime


def test_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with runtime.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_device_names() -> None:
    assert runtime.resolve_device("cpu") == torch.device("cpu")
    assert runtime.resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert runtime.resolve_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ValueError, match="unknown device 'gpu_x'"):
        runtime.resolve_device("gpu_x")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_absent_device_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda' is not available: this machine has only a CPU"):
        runtime.resolve_device("cuda")


def test_dtype_names() -> None:
    assert runtime.resolve_dtype("bf16") is runtime.resolve_dtype("bfloat16") is torch.bfloat16
    assert runtime.resolve_dtype("torch.float32") is runtime.resolve_dtype(torch.float32) is torch.float32
    with pytest.raises(ValueError, match="Did you mean 'float32'"):
        runtime.resolve_dtype("floot32")
    with pytest.raises(ValueError, match="not a floating point type"):
        runtime.resolve_dtype(torch.int64)


def test_precision_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.resolve_precision("float32", "cpu") is None
    assert runtime.resolve_precision("bfloat16", "cpu") is torch.bfloat16
    monkeypatch.setattr(runtime, "_cpu_capabilities", lambda: {"avx512_bf16": True})
    assert runtime.resolve_precision("auto", "cpu") is torch.bfloat16
    monkeypatch.setattr(runtime, "_cpu_capabilities", lambda: {"avx2": True, "avx512_f": True})
    assert runtime.resolve_precision("auto", "cpu") is None
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        runtime.resolve_precision("fp8", "cpu")


def test_seed_covers_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    runtime.set_seed(7)
    first = draw()
    runtime.set_seed(7)
    assert draw() == first
    runtime.set_seed(2**40)
    with pytest.raises(ValueError, match="seed must lie between"):
        runtime.set_seed(-1)


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    runtime.atomic_write_text(path, "old\n")
    runtime.atomic_write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_write_names_the_file_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError) as caught:
        runtime.atomic_write_text(path, "text")
    assert caught.value.filename == str(path)


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    runtime.atomic_write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        runtime.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_measurements_are_plausible_and_remembered() -> None:
    flops = runtime.measure_peak_flops("float32", "cpu", seconds=0.02)
    assert 1e7 < flops < 1e16
    assert runtime.measure_peak_flops("float32", "cpu", seconds=0.02) == flops
    bandwidth = runtime.measure_bandwidth("cpu", megabytes=16, seconds=0.01)
    assert 1e7 < bandwidth < 1e14


def test_report_is_json_and_text() -> None:
    report = runtime.environment_report()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"] == torch.__version__
    text = runtime.render_report(report)
    assert text.endswith("\n")
    assert "threads:" in text
    assert "  torch:" in text
    assert "not installed" in runtime.render_report({"x": None})
