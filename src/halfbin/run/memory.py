"""How much memory the process really holds, sampled while it works."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL_SECONDS = 0.02


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process (RssAnon): what it allocated, without mapped files. None off Linux."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def available_bytes() -> int | None:
    """Memory that can still be had without swapping (MemAvailable). None off Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def give_back() -> None:
    """Return memory that was freed to the system, where the allocator keeps it for later (glibc).

    Blocks of a model come and go in sizes that it would keep: without this the peak of a run was twice what was in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryPeak:
    """The highest anonymous resident memory inside a `with` block; `bytes` is None where it cannot be known."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="halfbin-memory", daemon=True)

    def _sample(self) -> None:
        while True:
            now = anonymous_bytes()
            if now is None:
                return
            self.bytes = max(self.bytes or 0, now)
            if self._stop.wait(INTERVAL_SECONDS):
                return

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop.set()
        self._thread.join()
