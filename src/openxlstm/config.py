"""Configurations: plain dataclasses that round-trip through dictionaries, YAML and JSON.

Every configuration in the package is a dataclass with the published field names. This module turns
mappings into them and back, checking names and types on the way: an unknown field is refused with the
nearest valid name, an ill-typed value with the type that was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

ConfigT = TypeVar("ConfigT")


def nearest_name(name: str, candidates: typing.Iterable[str], prefix: str = "") -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate closest to ``name``, or an empty string.

    ``prefix`` stands before the candidate in the answer, such as the section of a field.
    """
    match = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{prefix}{match[0]}'?" if match else ""


def config_from_dict(
    cls: type[ConfigT], values: Mapping[str, Any], *, ignore_unknown: bool = False, where: str = ""
) -> ConfigT:
    """Build the dataclass ``cls`` from ``values``, recursively.

    Args:
        cls: dataclass to build.
        values: field name to value; nested dataclasses as nested mappings.
        ignore_unknown: drop fields that ``cls`` does not have instead of refusing them (for files written
            by other programs).
        where: prefix for messages, such as ``"model."``.

    Raises:
        ValueError: unknown field, missing required field, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.') or cls.__name__}: expected a mapping of fields, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            if ignore_unknown:
                continue
            raise ValueError(
                f"unknown field '{where}{name}' for {cls.__name__}.{nearest_name(str(name), fields, where)} "
                f"Valid fields: {', '.join(fields)}"
            )
        arguments[name] = _coerce(hints[name], value, f"{where}{name}", ignore_unknown)
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__} needs a value for {', '.join(where + name for name in missing)}")
    return cls(**arguments)


def _coerce(hint: Any, value: Any, where: str, ignore_unknown: bool) -> Any:
    """Check ``value`` against the type ``hint`` and convert what YAML and JSON cannot express."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors: list[str] = []
        for option in args:
            if option is type(None):
                continue
            try:
                return _coerce(option, value, where, ignore_unknown)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if origin is typing.Literal:
        if value in args:
            return value
        hint_text = nearest_name(str(value), [str(a) for a in args])
        raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}.{hint_text}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        return config_from_dict(hint, value, ignore_unknown=ignore_unknown, where=f"{where}.")
    if origin in (list, tuple):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        element = args[0] if args else Any
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise ValueError(f"{where} must have {len(args)} entries, got {value!r}")
            return tuple(
                _coerce(a, v, f"{where}[{n}]", ignore_unknown)
                for n, (a, v) in enumerate(zip(args, value, strict=True))
            )
        return origin(_coerce(element, v, f"{where}[{n}]", ignore_unknown) for n, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is int and isinstance(value, bool):
        raise ValueError(f"{where} must be int, got {value!r}")
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into nested plain dictionaries (constructor fields only) for YAML and JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not valid YAML or JSON, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration file '{path}' does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text; convert it to UTF-8 first") from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:
        raise ValueError(f"'{path}' is not a valid configuration file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' must hold a mapping of field names to values")
    return values
