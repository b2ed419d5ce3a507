"""The shipped kernel configurations compile for every target, within its budget and without new spills.

The committed table (``resources.json``) names the Triton version it was made with. That version must not
spill a byte more than recorded; another must stay within budget and within twice the spills. Two scenarios
are compiled here, each for one target; all of them for all targets in the slow tests, and with them every
branch on constants that the shipped configurations do not reach.
"""

from __future__ import annotations

import json
from importlib.metadata import version

import compile_kernels as tool
import pytest

WITHOUT_PRODUCTS = (
    "chunk_changes_kernel", "entering_kernel", "scalars_kernel", "rows_kernel", "gate_gradients_kernel",
)  # fmt: skip
TABLE = json.loads(tool.TABLE.read_text())
ROWS = TABLE["rows"]


def expected(target: str, scenario: str) -> dict[str, dict]:
    rows = [row for row in ROWS if (row["target"], row["scenario"]) == (target, scenario)]
    return {key(row): row for row in rows}


def key(row: dict) -> str:
    return f"{row['kernel']} {row['options']}"


def test_table_is_complete_and_within_budget():
    """Every target and scenario is in the table; shared memory fits; NVIDIA matrix kernels use its units."""
    assert {(row["target"], row["scenario"]) for row in ROWS} == {
        (target, scenario) for target in tool.TARGETS for scenario in tool.SCENARIOS
    }
    for row in ROWS:
        assert row["shared"] <= tool.SHARED_MEMORY[row["target"]], key(row)
        if row["scenario"] == "mlstm-bfloat16" and row["kernel"] not in WITHOUT_PRODUCTS:
            unit = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[row["target"]]
            assert row["instructions"].get(unit), (key(row), row["instructions"])


def allowed_spills(recorded: dict) -> int:
    """Bytes per thread: what is recorded, and twice that and some under another compiler."""
    same = version("triton") == TABLE["triton"]
    return recorded["spills"] if same else 2 * recorded["spills"] + 64


def compare(target: str, scenario: str) -> None:
    known = expected(target, scenario)
    rows = tool.in_process(target, scenario)
    assert {key(row) for row in rows} == set(known), "configurations changed: rewrite the table"
    for row in rows:
        old = known[key(row)]
        assert row["shared"] <= tool.SHARED_MEMORY[target], key(row)
        assert row["spills"] <= allowed_spills(old), (key(row), row["spills"], old["spills"])
        assert bool(row["instructions"]) == bool(old["instructions"]), key(row)


@pytest.mark.parametrize(
    ("target", "scenario"), [("sm_90", "step-bfloat16"), ("gfx942", "slstm-64-bfloat16")]
)
def test_compiles_as_recorded(triton_device, target, scenario):
    compare(target, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("target", tool.TARGETS)
@pytest.mark.parametrize("scenario", tool.SCENARIOS)
def test_everything_compiles_as_recorded(triton_device, target, scenario):
    compare(target, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("target", tool.TARGETS)
def test_every_branch_compiles(triton_device, target):
    """The interpreter accepts what the compiler does not: types that change in a loop, names bound in one
    branch alone."""
    for row in tool.in_process(target, "branches"):
        assert row["shared"] <= tool.SHARED_MEMORY[target], key(row)


def test_new_spills_fail(triton_device, monkeypatch):
    """One byte more than recorded is an error with the recorded compiler."""
    target, scenario = "sm_90", "mlstm-bfloat16"
    rows = [row for row in ROWS if (row["target"], row["scenario"]) == (target, scenario)]
    monkeypatch.setitem(TABLE, "triton", version("triton"))
    monkeypatch.setattr(tool, "in_process", lambda *_: rows)
    compare(target, scenario)
    worse = [row | {"spills": row["spills"] + 8} for row in rows]
    monkeypatch.setattr(tool, "in_process", lambda *_: worse)
    with pytest.raises(AssertionError):
        compare(target, scenario)
    monkeypatch.setattr(tool, "in_process", lambda *_: [row | {"shared": 1 << 20} for row in rows])
    with pytest.raises(AssertionError):
        compare(target, scenario)


def test_a_compiler_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(tool.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        tool.in_process("sm_90", "step-bfloat16")
