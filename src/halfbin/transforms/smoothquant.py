"""SmoothQuant: move a part of the activations' range into the weights, channel by channel.

Source: Xiao, Lin, Seznec, Wu, Demouth, Han 2022, https://arxiv.org/abs/2211.10438, section 4, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.tensor import InputQuantizer, Scheme, dequantize, quantize
from halfbin.transforms.limits import limited

_TINY = torch.finfo(torch.float64).tiny


def smoothing_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """The scale s of each channel: x is divided by it, and the columns that read x are multiplied.

    s = max|x|^alpha / max|w|^(1 - alpha). alpha = 1 moves all of the difficulty to the weights, 0 all of it to the inputs, 0.5
    gives both the same range. Scales stay within [1 / LARGEST, LARGEST] of `limits.py`.

    Args:
      x_absmax: float [in_features], the largest |x| of each channel.
      w_absmax: float [in_features], the largest |w| of each column over all weights that read it.
      alpha: in [0, 1]; 0.5 in the paper, 0.75 and more for models with larger outliers.

    Returns:
      float32 [in_features], > 0; 1 where a channel or its columns are all zeros.

    Raises:
      DataError: alpha outside [0, 1], or ranges that differ in shape, are negative or not finite.
    """
    x, w = x_absmax.to(torch.float64), w_absmax.to(torch.float64)
    fine = x.shape == w.shape and all(bool((m >= 0).all()) and bool(torch.isfinite(m).all()) for m in (x, w))
    if not 0.0 <= alpha <= 1.0 or not fine:
        raise DataError(
            f"alpha={alpha} must be in [0, 1], and ranges finite and not negative, for {list(x.shape)} channels and "
            f"{list(w.shape)} columns alike"
        )
    scale = x.clamp(min=_TINY) ** alpha / w.clamp(min=_TINY) ** (1 - alpha)
    return limited(torch.where((x > 0) & (w > 0), scale, 1.0))


def product_loss(x: Tensor, weight: Tensor, scale: Tensor, *, inputs: InputQuantizer, weights: Scheme) -> float:
    """||X W^T - x_hat w_hat^T||^2 with x_hat = X / s and w_hat = W * s rounded to nearest: what a search for alpha minimises.

    Args:
      x: float32 [tokens, in_features], some inputs.
      weight: float32 [out_features, in_features]; for several layers that read x, add their losses.
      scale: s, float32 [in_features].
      inputs: what rounds X / s.
      weights: what the weight is rounded to.
    """
    x_hat = inputs.fake_quantize(x / scale)
    w_hat = dequantize(quantize(weight * scale, weights))
    return float((x @ weight.T - x_hat @ w_hat.T).square().sum(dtype=torch.float64))
