"""How much memory the process really holds, sampled while it works."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL_SECONDS = 0.02
LARGE_BYTES = 4 * 2**20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


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


def return_large_tensors() -> None:
    """From now on, let tensors of `LARGE_BYTES` and more have memory that the system gets back with them (glibc).

    By itself the allocator keeps pieces of up to 32 MiB once one was freed, and tensors of many sizes tear them apart: a run
    with 285 MB in use held 442. Fetching such memory anew costs 5 % of a run's time where tensors are that small; larger ones
    are given back either way. It stays so until the process ends.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE_BYTES)


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
