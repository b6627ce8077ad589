"""Rewrites of a float model that leave its function unchanged and make it easier to quantize: the arithmetic of each."""

from __future__ import annotations

from halfbin.transforms.awq import RATIOS, awq_scale, layer_loss, relative_magnitude
from halfbin.transforms.hadamard import hadamard, largest_order
from halfbin.transforms.rotate import centred, fold_norm, fold_scale, per_head, rotate_inputs, rotate_outputs
from halfbin.transforms.rotation import Composed, Rotation, mean_keeping_hadamard, random_hadamard
from halfbin.transforms.search import search_scale
from halfbin.transforms.smoothquant import product_loss, smoothing_scale

__all__ = [
    "RATIOS",
    "Composed",
    "Rotation",
    "awq_scale",
    "centred",
    "fold_norm",
    "fold_scale",
    "hadamard",
    "largest_order",
    "layer_loss",
    "mean_keeping_hadamard",
    "per_head",
    "product_loss",
    "random_hadamard",
    "relative_magnitude",
    "rotate_inputs",
    "rotate_outputs",
    "search_scale",
    "smoothing_scale",
]
