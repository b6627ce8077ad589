"""Silence for what other libraries would say on their own: progress bars, advice, attempts to reach the network."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

# Defaults only: what the user has set stays.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # halfbin never downloads, and a name that is no directory should fail at once
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def set_up() -> None:
    """Set the environment that those libraries read when they are first imported, and how warnings are shown."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning


@contextlib.contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Silence tqdm also where a library asks for its bar outright, as compressed-tensors does; TQDM_DISABLE cannot."""
    try:
        from tqdm.std import tqdm  # type: ignore[import-untyped] # ships no types
    except ImportError:
        yield
        return
    original = tqdm.__init__

    def disabled(self: object, *arguments: object, **options: object) -> None:
        original(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line without the source line that raised it, which is no business of the user's."""
    print(f"warning: {message}", file=file or sys.stderr)
