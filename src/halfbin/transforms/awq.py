"""AWQ: weights that meet large activations are made larger before rounding, and the activations smaller.

Source: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, https://arxiv.org/abs/2306.00978, section 3.2: the scale
is a power of the mean |x| of a channel, and the power, from a grid of 20 in [0, 1), is searched for the least error of the
layers' outputs. We compute that error from X^T X, so that no activations are kept. The paper's clip search belongs to the
method: `methods/clip.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics.low_rank import LowRank
from halfbin.numerics.output_error import output_error
from halfbin.tensor import Scheme, dequantize, quantize, scale_shape, spread
from halfbin.tensor.granularity import regions
from halfbin.transforms.limits import LARGEST, limited

NUM_RATIOS = 20  # of the released search
RATIOS = tuple(i / NUM_RATIOS for i in range(NUM_RATIOS))


def awq_scale(x_mean_abs: Tensor, ratio: float, w_mean: Tensor | None = None) -> Tensor:
    """The scale s of each channel: columns are multiplied by it, and what gives x is divided.

    s = mean|x|^ratio, or mean|x|^ratio / w_mean^(1 - ratio), normalised so that sqrt(max * min) = 1.

    Args:
      x_mean_abs: float [in_features], the mean |x| of each channel. Means more than `limits.LARGEST` squared below the largest
        one count as that: a channel that is hardly ever used must not decide how the others are normalised.
      ratio: the power, in [0, 1]; 0 gives exactly 1 everywhere, with or without `w_mean`: rounding to nearest as it is.
      w_mean: float [in_features], `relative_magnitude` of the weights that read x; the released code's later variant.

    Returns:
      float32 [in_features] in [1 / LARGEST, LARGEST]; 1 for channels that are always 0.

    Raises:
      DataError: a ratio outside [0, 1], statistics that differ in shape, are negative or not finite.
    """
    x = x_mean_abs.to(torch.float64)
    w = torch.ones_like(x) if w_mean is None else w_mean.to(torch.float64)
    if not 0.0 <= ratio <= 1.0 or x.shape != w.shape or not _are_magnitudes(x, w):
        raise DataError(
            f"ratio={ratio} must be in [0, 1], and mean magnitudes finite and not negative, for {list(x.shape)} channels and "
            f"{list(w.shape)} columns alike"
        )
    alive = (x > 0) & (w > 0)
    if ratio == 0 or not bool(alive.any()):
        return torch.ones_like(x, dtype=torch.float32)
    scale = (x / x.max()).clamp(min=LARGEST**-2) ** ratio / w.clamp(min=LARGEST**-2) ** (1 - ratio)
    low, high = scale[alive].min(), scale[alive].max()
    return limited(torch.where(alive, scale / (low * high).sqrt(), 1.0))


def relative_magnitude(weight: Tensor, scheme: Scheme) -> Tensor:
    """The mean over rows of |w| / the largest |w| that shares its scale: how much a column has to lose, and others by it.

    Args:
      weight: float [out_features, in_features], all weights that read x, one below the other.
      scheme: says which weights share a scale.

    Returns:
      float32 [in_features], in [0, 1].

    Raises:
      SchemeError: the weight is no matrix.
    """
    if weight.ndim != 2:
        raise SchemeError(f"a weight [out_features, in_features] was expected, got {list(weight.shape)}")
    magnitude = weight.to(torch.float32).abs()
    shape = (magnitude.shape[0], magnitude.shape[1])
    largest = magnitude.new_zeros(scale_shape(shape, scheme.granularity))
    for region in regions(shape, scheme.granularity):
        largest[region.tiles] = region.rows(magnitude).amax(1).reshape(largest[region.tiles].shape)
    largest = torch.where(largest > 0, largest, 1.0)
    return (magnitude / spread(largest, shape, scheme.granularity)).mean(0)


def layer_loss(weight: Tensor, scheme: Scheme, second_moment: Tensor | LowRank, scale: Tensor) -> float:
    """||X (w_hat / s - weight)^T||^2 with w_hat = weight * s rounded to nearest: what rounding under a scale costs the outputs.

    Args:
      weight: float32 [out_features, in_features], or some rows of it; whole tiles of the scheme.
      scheme: what it is rounded to.
      second_moment: X^T X, float32 [in_features, in_features], or what `low_rank` makes of it, which is much faster.
      scale: s, float32 [in_features]; for several layers that read x, add their losses.
    """
    error = dequantize(quantize(weight * scale, scheme)).div_(scale).sub_(weight)
    return output_error(error, second_moment)


def _are_magnitudes(*statistics: Tensor) -> bool:
    return all(bool((s >= 0).all()) and bool(torch.isfinite(s).all()) for s in statistics)
