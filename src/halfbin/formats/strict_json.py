"""JSON of a stranger: bounded in size and depth, without doubled keys, and an object at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from halfbin.errors import FormatError

MOST_BYTES = 64 * 2**20  # our own layout lists every tensor: 100 bytes each for half a million of them
MOST_LEVELS = 64


def read_json_object(path: Path) -> dict[str, object]:
    """The object in the file at `path`.

    Raises:
      FormatError: no such file, too large, no UTF-8, no JSON, a doubled key, NaN, too deep, or no object.
    """
    if not path.is_file():
        raise FormatError(f"{path} does not exist; expected a Hugging Face model directory with a config.json")
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise FormatError(f"{path} is larger than {MOST_BYTES} bytes, which no configuration is")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object")
    _require_shallow(path, value)
    return value


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _require_shallow(path: Path, value: object) -> None:
    level: list[object] = [value]
    for _ in range(MOST_LEVELS):
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        if not inner:
            return
        level = inner
    raise FormatError(f"{path} is nested deeper than {MOST_LEVELS} levels")
