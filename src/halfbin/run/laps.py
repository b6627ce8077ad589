"""Seconds by name, in the order in which the names came up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Laps:
    """Adds up the time spent under each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`, also when it raises."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def add(self, other: Laps) -> None:
        """Add the seconds of work that went on elsewhere."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
