"""A plan whose codes depend on data: block after block is loaded, observed, transformed, rounded and handed on."""

from __future__ import annotations

from halfbin.run.blockwise.loop import quantize_blocks
from halfbin.run.blockwise.ranges import input_quantizer
from halfbin.run.blockwise.state import Outcome, Rounded

__all__ = ["Outcome", "Rounded", "input_quantizer", "quantize_blocks"]
