"""Ctrl-C and SIGTERM, alike: a KeyboardInterrupt, and the memory that there was one.

What libraries make of a KeyboardInterrupt in the middle of `import torch` was a RecursionError of NumPy's, an ImportError, or
nothing at all, and then the run went on. So until there is something to clean up the program simply ends. Later, whatever
is raised after a signal counts as the interruption.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # as shells give it: 128 + SIGINT
LAST_WORDS = b"interrupted; nothing was written\n"

_arrived: list[int] = []
_started: list[bool] = []


def listen() -> None:
    """Let both signals interrupt; SIGINT is left alone where whoever started us ignores it, as nohup and `&` do."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def work_starts() -> None:
    """The libraries are imported; from now on an interruption must be cleaned up after."""
    _started.append(True)


def arrived() -> bool:
    """Whether a signal has interrupted the program."""
    return bool(_arrived)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _arrived.append(number)
    if not _started:
        os.write(2, LAST_WORDS)
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt
