"""SmoothQuant: move a part of the activations' range into the weights, channel by channel.

Source: Xiao, Lin, Seznec, Wu, Demouth, Han 2022, https://arxiv.org/abs/2211.10438, section 4, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError

LEAST = 1e-5  # of a range; below it a channel counts as dead


def smoothing_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """The scale s of each channel: x is divided by it, and the columns that read x are multiplied.

    s = max|x|^alpha / max|w|^(1 - alpha). alpha = 1 gives all of the difficulty to the weights, 0 none of it.

    Args:
      x_absmax: float [in_features], the largest |x| of each channel.
      w_absmax: float [in_features], the largest |w| of each column over all weights that read it.
      alpha: in [0, 1].

    Returns:
      float32 [in_features], > 0; 1 where a channel or its columns are dead.

    Raises:
      DataError: alpha or the shapes make no sense.
    """
    if not 0.0 <= alpha <= 1.0 or x_absmax.shape != w_absmax.shape:
        raise DataError(f"alpha={alpha} must be in [0, 1], and {list(x_absmax.shape)} equal {list(w_absmax.shape)}")
    x, w = x_absmax.to(torch.float64), w_absmax.to(torch.float64)
    scale = x.clamp(min=LEAST) ** alpha / w.clamp(min=LEAST) ** (1 - alpha)
    return torch.where((x > LEAST) & (w > LEAST), scale, 1.0).to(torch.float32)
