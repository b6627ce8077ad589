"""Compiled loops on the threads that torch computes with; `csrc/cpu/threads.h` says why.

torch brings a GNU OpenMP runtime of its own along, under a name that no linker would find. It is looked for among the libraries
that are loaded. Where it is not found (macOS, another OpenMP), the loops have a small pool of their own.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from halfbin.kernels import _native

MAPS = Path("/proc/self/maps")


@functools.cache
def share_torchs_threads() -> bool:
    """From now on, run compiled loops on torch's threads, if they can be found; whether they do."""
    runtime = _loaded_runtime(_mapped_files())
    if runtime is not None:
        try:
            function = ctypes.CDLL(str(runtime)).GOMP_parallel
        except (OSError, AttributeError):
            return False
        _native.use_openmp(ctypes.cast(function, ctypes.c_void_p).value or 0)
    return _native.uses_openmp()


def _loaded_runtime(files: list[Path]) -> Path | None:
    """torch's own OpenMP runtime, or the only one that there is."""
    runtimes = [file for file in files if file.name.startswith("libgomp")]
    torchs = [file for file in runtimes if Path(torch.__file__).parent in file.parents]
    return next(iter(torchs or (runtimes if len(runtimes) == 1 else [])), None)


def _mapped_files() -> list[Path]:
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(Path(line.split(maxsplit=5)[5]) for line in lines if "/" in line))
