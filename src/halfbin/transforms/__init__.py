"""Rewrites of a float model that leave its function unchanged and make it easier to quantize: the arithmetic of each."""

from __future__ import annotations

from halfbin.transforms.awq import awq_scale, layer_loss, search_scale
from halfbin.transforms.smoothquant import smoothing_scale

__all__ = ["awq_scale", "layer_loss", "search_scale", "smoothing_scale"]
