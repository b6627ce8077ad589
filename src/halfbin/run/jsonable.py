"""Frozen dataclasses to JSON and back, by their annotations.

JSON has no infinity and no NaN, and Python's writer invents them. A perplexity that overflowed is a finding, not an absence:
non-finite numbers become the strings "Infinity", "-Infinity" and "NaN", which `float()` here and `Number()` in JavaScript
read back, and null keeps its one meaning, "not measured".
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from halfbin.errors import FormatError

T = TypeVar("T")

NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_json(value: object) -> Any:
    """`value` as what `json.dumps(..., allow_nan=False)` accepts: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def from_json(kind: type[T], data: object, where: str = "") -> T:
    """The value of dataclass `kind` that `data`, parsed JSON, stands for. Keys that it has no field for are passed over.

    Raises:
      FormatError: a key is missing or holds the wrong type, with the path to it.
    """
    found: T = _read(kind, data, where)
    return found


def _read(kind: Any, data: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, _expect(data, dict, where), where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        some = next(argument for argument in arguments if argument is not types.NoneType)
        return None if data is None else _read(some, data, where)
    if origin is tuple:
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(data, list, where)))
    if origin is not None and issubclass(origin, Mapping):
        items = _expect(data, dict, where).items()
        return {str(key): _read(arguments[1], item, f"{where}.{key}") for key, item in items}
    return _read_float(data, where) if kind is float else _expect(data, kind, where)


def _read_dataclass(kind: Any, data: dict[str, object], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        path = f"{where}.{field.name}".lstrip(".")
        if field.name in data:
            values[field.name] = _read(hints[field.name], data[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{path!r} is missing; was this file written by another program, or cut off?")
    return kind(**values)


def _read_float(data: object, where: str) -> float:
    if isinstance(data, str) and data in NON_FINITE:
        return NON_FINITE[data]
    if isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    return float(_expect(data, float, where))


def _expect(data: object, kind: type, where: str) -> Any:
    if isinstance(data, kind) and not (isinstance(data, bool) and kind is int):
        return data
    raise FormatError(
        f"{where or 'the document'!r} should be {kind.__name__}, but is {type(data).__name__}: {data!r:.60}"
    )
