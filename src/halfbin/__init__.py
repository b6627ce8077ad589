"""halfbin: make trained networks smaller by quantization, and prove what it cost.

    import halfbin as hb
    report = hb.quantize("path/to/model", "out", recipe="int4")
    model = hb.load("out")

The verbs live in `halfbin.api` and are imported when first used, so that `halfbin --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from halfbin.errors import HalfbinError

if TYPE_CHECKING:
    from halfbin.api import bench, check_calibration, evaluate, inspect, load, plan, quantize

__version__ = "0.1.0"

__all__ = [
    "HalfbinError",
    "__version__",
    "bench",
    "check_calibration",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "quantize",
]


def __getattr__(name: str) -> object:
    """The verbs, by their first use."""
    if name in __all__:
        return getattr(importlib.import_module("halfbin.api"), name)
    raise AttributeError(f"module 'halfbin' has no attribute {name!r}")
