"""AWQ: weights that meet large activations are made larger before rounding, and the activations smaller.

Source: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, https://arxiv.org/abs/2306.00978, section 3.2: the scale
is a power of the mean |x| of a channel, and the power is searched for the least error of the layer's output. We compute that
error from X^T X, so that no activations are kept. Its clip search belongs to the method, not to the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halfbin.tensor import Scheme, dequantize, quantize

LEAST = 1e-4  # of the normalised scale; as in the released search


def awq_scale(x_mean_abs: Tensor, ratio: float) -> Tensor:
    """The scale s of each channel: columns are multiplied by it, and what gives x is divided.

    Args:
      x_mean_abs: float [in_features], the mean |x| of each channel.
      ratio: the power; 0 gives exactly 1 everywhere, which leaves rounding to nearest as it is.

    Returns:
      float32 [in_features], > 0, normalised so that sqrt(max * min) = 1; 1 for channels that are always 0.
    """
    x = x_mean_abs.to(torch.float64)
    alive = x > 0
    if ratio == 0 or not bool(alive.any()):
        return torch.ones(len(x))
    scale = x.pow(ratio).clamp(min=LEAST)
    low, high = scale[alive].min(), scale[alive].max()
    return torch.where(alive, scale / (low * high).sqrt(), 1.0).to(torch.float32)


def layer_loss(weight: Tensor, scheme: Scheme, second_moment: Tensor, scale: Tensor) -> float:
    """||X (w_hat - weight)^T||^2 when the weight is rounded to nearest under `scale`.

    Args:
      weight: float32 [out_features, in_features], or some rows of it.
      scheme: what it is rounded to.
      second_moment: X^T X, float32 [in_features, in_features].
      scale: float32 [in_features]; the weight is rounded as weight * scale, and divided by it again.
    """
    difference = dequantize(quantize(weight * scale, scheme)) / scale - weight
    return float(((difference @ second_moment) * difference).sum(dtype=torch.float64))


def search_scale(candidates: Sequence[Tensor], loss: Callable[[Tensor], float]) -> tuple[Tensor, list[float]]:
    """The candidate with the least loss, the first of equals; and all losses."""
    losses = [loss(candidate) for candidate in candidates]
    return candidates[min(range(len(losses)), key=losses.__getitem__)], losses
