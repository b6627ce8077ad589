"""Let the disk work on what was written while more is being made."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin to write what is not yet on its way, and wait for nothing


def begin_writing_back(handle: int) -> None:
    """Ask the system to bring an open file's new pages to the disk from now on, and return at once.

    By itself Linux begins when a tenth of the memory waits to be written, or after 30 s: a file of 0.76 GB lay in the cache
    whole when its fsync began, 0.32 s before the end of a run of 2.7 s. Only the fsync promises anything; elsewhere, and
    where the file system does not know this call, nothing happens.
    """
    if (call := _sync_file_range()) is not None:
        call(handle, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0 bytes from 0 on: the whole file


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        return call
    return None
