"""What an error in a weight does to a layer's outputs, from the second moment of its inputs: no inputs need be kept.

With outputs X W^T and an error E of the weight, ||X E^T||_F^2 = tr(E X^T X E^T) = sum over rows e of E of e M e^T, M = X^T X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.numerics.low_rank import LowRank

_CHUNK = 1 << 22  # elements of E that are worked on at once: 16 MiB, and their products
_BLOCKS = 8  # M is symmetric: of 8 x 8 blocks, 36 are needed


def output_error(error: Tensor, second_moment: Tensor | LowRank) -> float:
    """tr(E M E^T), products in float32 and sums over them in float64.

    Args:
      error: E, float32 [out_features, in_features]: w_hat - weight, or some rows of it.
      second_moment: M = X^T X, float32 [in_features, in_features], symmetric; or what `low_rank` makes of it.

    Returns:
      the sum of the squares of X E^T; it may come out below 0 by rounding where E is almost orthogonal to all inputs.
    """
    if isinstance(second_moment, LowRank):
        alone = (error.square().sum(0, dtype=torch.float64) * second_moment.rest).sum()
        return float(alone + (error @ second_moment.factor).square().sum(dtype=torch.float64))
    n = error.shape[1]
    width, total = max(-(-n // _BLOCKS), 1), 0.0
    for rows in torch.split(error, max(_CHUNK // max(n, 1), 1)):
        for start in range(0, n, width):
            stop = min(start + width, n)
            here = rows[:, start:stop]
            product = here @ second_moment[start:stop, start:stop]
            product.addmm_(rows[:, stop:], second_moment[stop:, start:stop], alpha=2)
            total += float(product.mul_(here).sum(dtype=torch.float64))
    return total
