"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from halfbin.run.wording import printable

WIDTH_OF_FILES = 160  # where nobody's window sets a width, so that names are not cut at 80


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Rich would leave with 1, which here means that the user can mend something."""
        raise BrokenPipeError


def results() -> Console:
    """The console for what the user asked for."""
    return _console(stderr=False)


def remarks() -> Console:
    """The console for progress, warnings and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    found = _Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not found.is_terminal and "COLUMNS" not in found._environ:
        return _Console(stderr=stderr, highlight=False, width=WIDTH_OF_FILES)
    return found


def print_json(value: object) -> None:
    """One JSON document on stdout, in ASCII, so that it suits every encoding."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(text: str, style: str = "") -> Text:
    """A stranger's text: no markup in it is obeyed, and nothing in it moves the cursor."""
    return Text(printable(text), style=style)
