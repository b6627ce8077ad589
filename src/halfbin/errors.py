"""What can go wrong, as a small tree. Whoever catches `HalfbinError` has caught everything that a user can mend.

    HalfbinError            the user can fix it; the message says what was seen, what was expected, what to do next
    ├── SchemeError         a format, granularity or scheme that means nothing, or does not fit a tensor's shape
    ├── DataError           numbers that cannot be quantized: NaN or infinity in a weight
    ├── FormatError         a file that is not what it claims to be; the only error a stranger's file can raise
    ├── RecipeError         a recipe with an unknown key, a wrong value, or a rule that matches nothing
    ├── ModelError          a model that cannot be opened: no class for it, or it needs its own code
    ├── OutputError         the output cannot be written: folder not empty, disk full
    └── LimitError          the run finished, but a limit that the user set (--max-kl) was exceeded

Lower rooms know sizes but no names; a caller that knows the layer adds it with `error.add_note(...)`, once, on the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HalfbinError(Exception):
    """Anything that the user can mend. Exit code 1, no traceback."""

    def __str__(self) -> str:
        """The message, followed by the notes that rooms added on the way out, one a line."""
        return "\n  ".join([super().__str__(), *getattr(self, "__notes__", [])])


class SchemeError(HalfbinError, ValueError):
    """A scheme that means nothing, or does not fit a shape."""


class DataError(HalfbinError, ValueError):
    """Numbers that cannot be quantized."""


class FormatError(HalfbinError):
    """A file that is not what it claims to be."""


class RecipeError(HalfbinError, ValueError):
    """A recipe that cannot be understood, or does not fit the model."""


class ModelError(HalfbinError):
    """A model that cannot be opened."""


class OutputError(HalfbinError):
    """A result that cannot be written."""


class LimitError(HalfbinError):
    """A finished run that exceeded a limit set by the user."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; expected one of {', '.join(known)}"
