"""``openxlstm doctor``: each thing that could be better is one line that says what to do."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from openxlstm.cli.advice import advice, usable_cores
from openxlstm.ops.native import loader

BEST = loader.Status("compiled", "library.so", "avx512", ("avx512", "avx2", "portable"), 2, None)


def about(native: loader.Status = BEST, **changes) -> list[str]:
    return advice(native, **{"cores": 2, "bfloat16_units": True, **changes})


def test_nothing_to_improve():
    assert about(bandwidth=40e9, cores_used_by_others=0.1) == []


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ({"tier": "disabled", "isa": None, "isas": (), "reason": "off"}, "OPENXLSTM_NATIVE=0"),
        ({"tier": "unavailable", "isa": None, "isas": (), "reason": "install g++"}, "slower: install g++"),
        ({"isa": "avx2"}, "OPENXLSTM_ISA=avx2 forces a slower instruction set than avx512: unset it"),
        ({"threads": 1}, r"1 of 2 cores are used: .*OMP_NUM_THREADS"),
        ({"threads": 3}, "3 threads share 2 cores and wait for each other: set OMP_NUM_THREADS=2"),
    ],
)
def test_native_kernels_and_threads(native, expected):
    (line,) = about(replace(BEST, **native))
    assert re.search(expected, line)


@pytest.mark.parametrize("setting", [None, "1"])
def test_how_to_get_more_threads(monkeypatch, setting):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    (line,) = about(replace(BEST, threads=1))
    assert ("unset OMP_NUM_THREADS," if setting else "set OMP_NUM_THREADS=2,") in line


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"bfloat16_units": False}, "no bfloat16 units: bfloat16 saves memory and no time; train in float32"),
        ({"bandwidth": 9e9}, "memory is read at 9 GB/s, which bounds decoding: int8 or int4 weights"),
        ({"cores_used_by_others": 1.3}, "other processes use 1.3 of 2 cores"),
    ],
)
def test_measured_limits(measured, expected):
    (line,) = about(**measured)
    assert expected in line


def test_a_busy_machine_says_nothing_about_its_memory():
    (line,) = about(bandwidth=9e9, cores_used_by_others=1.3)
    assert "other processes" in line


def test_the_command_shows_it(cli, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(loader, "_find", lambda: loader._Loaded("unavailable", reason="no compiler: get one"))
    try:
        torch.set_num_threads(usable_cores() + 1)
        code, out, _ = cli("doctor", "--no-measure")
        lines = out.splitlines()
        after = lines[lines.index("to improve:") + 1 :]
        assert code == 0
        assert after[0] == "  no native kernels, and decoding is several times slower: no compiler: get one"
        assert "threads share" in after[1]
        assert json.loads(cli("doctor", "--no-measure", "--json").out)["advice"][0] == after[0].strip()
    finally:
        torch.set_num_threads(threads)
