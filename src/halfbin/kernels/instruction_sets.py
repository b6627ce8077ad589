"""Which compiled form of a loop runs here: all give the same bits, so only time depends on it."""

from __future__ import annotations

import functools

from halfbin.kernels.cpu import features

PORTABLE = "portable"
BEST_FIRST = ("avx512", "avx2", PORTABLE)


def usable() -> tuple[str, ...]:
    """The forms that this processor can run, the fastest first; the portable one is always there."""
    return tuple(name for name in BEST_FIRST if name == PORTABLE or name in features())


@functools.cache
def best() -> str:
    """The fastest form that this processor can run."""
    return usable()[0]
