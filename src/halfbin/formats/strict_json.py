"""A stranger's JSON file: bounded in size and depth, and an object at the top. What is read within it: `_json`."""

from __future__ import annotations

from pathlib import Path

from halfbin.errors import FormatError
from halfbin.formats._json import parse_json

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
    value = parse_json(raw, str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, expected an object")
    _require_shallow(path, value)
    return value


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
