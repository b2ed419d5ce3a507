"""Configurations: dictionaries in and out, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from openxlstm.config import config_from_dict, config_to_dict, nearest_name, read_mapping


@dataclass
class Inner:
    num_heads: int = 4
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    width: int
    rate: float = 0.1
    positions: list[int] | str = field(default_factory=list)
    inner: Inner | None = None
    derived: int = field(default=0, init=False)


def test_round_trip():
    values = {"width": 3, "rate": 1, "positions": [1, 2], "inner": {"num_heads": 2, "kind": "b"}}
    config = config_from_dict(Outer, values)
    assert config == Outer(3, 1.0, [1, 2], Inner(2, "b"))
    assert config_from_dict(Outer, config_to_dict(config)) == config
    assert config_from_dict(Outer, {"width": 1, "positions": "all", "inner": None}).positions == "all"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "unknown field 'widht' for Outer. Did you mean 'width'"),
        ({"width": 3, "inner": {"num_head": 1}}, "unknown field 'inner.num_head' .* 'inner.num_heads'"),
        ({}, "Outer needs a value for width"),
        ({"width": "three"}, "width must be int, got 'three'"),
        ({"width": True}, "width must be int, got True"),
        ({"width": 2.5}, "width must be int"),
        ({"width": 3, "rate": "fast"}, "rate must be float"),
        ({"width": 3, "inner": {"kind": "c"}}, r"inner.kind must be one of 'a', 'b', got 'c'"),
        ({"width": 3, "positions": [1, "x"]}, r"positions\[1\] must be int"),
        ({"width": 3, "inner": 5}, "inner: expected a mapping"),
        ({"width": 3, "derived": 5}, "unknown field 'derived'"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(Outer, values)


def test_foreign_fields_can_be_ignored():
    assert config_from_dict(Outer, {"width": 1, "torch_dtype": "x"}, ignore_unknown=True) == Outer(1)


def test_yaml_exponents_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("width: 2\nrate: 3e-4\n")
    assert config_from_dict(Outer, read_mapping(path)).rate == 3e-4


def test_files_that_are_no_configurations(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_mapping(tmp_path / "c.yaml")
    for name, text in (("c.yaml", "a: [1"), ("c.json", "{"), ("d.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_mapping(tmp_path / name)


def test_nearest_name():
    assert nearest_name("chunkwize", ["chunkwise", "parallel"]) == " Did you mean 'chunkwise'?"
    assert nearest_name("zzz", ["chunkwise"]) == ""
