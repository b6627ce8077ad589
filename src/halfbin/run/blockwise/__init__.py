"""A plan whose codes depend on data: block after block is loaded, observed, transformed, rounded and handed on."""

from __future__ import annotations

from halfbin.run.blockwise.loop import Outcome, Rounded, quantize_blocks

__all__ = ["Outcome", "Rounded", "quantize_blocks"]
