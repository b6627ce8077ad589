"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from halfbin.run.wording import printable

BLANK = Text()
LABEL_WIDTH = 16
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


def page(*parts: RenderableType) -> RenderableType:
    """Parts below each other, set off from what stands around them."""
    return Padding(Group(*parts), (1, 0, 1, 1), expand=False)


def rows() -> Table:
    """An empty table with headings."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def facts() -> Table:
    """An empty table of label, value and remark; labels take the same room everywhere, so that values line up."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=LABEL_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def print_json(value: object) -> None:
    """One JSON document on stdout, in ASCII, so that it suits every encoding."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(text: str, style: str = "") -> Text:
    """A stranger's text: no markup in it is obeyed, and nothing in it moves the cursor."""
    return Text(printable(text), style=style)
