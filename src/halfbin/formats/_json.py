"""JSON from strangers: whatever is wrong with it is a `FormatError`, and no name is given twice in silence."""

from __future__ import annotations

import json
from typing import Any

from halfbin.errors import FormatError


def parse_json(text: bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
      text: as it lies in the file; UTF-8.
      where: the file, and the part of it, that the message begins with.

    Raises:
      FormatError: no UTF-8, no JSON, nested too deeply, a number beyond reason, a name that occurs twice in an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise FormatError(f"{where} names {name!r:.80} twice; which one is meant cannot be known")
            require_unicode(name, where)
            found[name] = value
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no JSON number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise FormatError(f"{where} is not JSON that anybody would write: it is nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON: {error}; download or copy it again") from error


def require_unicode(text: str, where: str) -> None:
    r"""Half of a surrogate pair (`"\ud800"`) is legal JSON but no text: it could never be written again."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise FormatError(f"{where} holds {text!r:.80}, which is no Unicode text")
