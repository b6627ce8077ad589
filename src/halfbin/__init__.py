"""halfbin: make trained networks smaller by quantization, and prove what it cost."""

from __future__ import annotations

__version__ = "0.1.0"
