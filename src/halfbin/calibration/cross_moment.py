"""A^T B over two streams of activations with the same tokens: how the inputs of a layer have moved since it was trained.

With B the inputs that a layer gets from the partly quantized model, and A how far they are from those of the float model, this
and the second moment of B tell how the layer's weight should change before it is rounded (`methods.correction`).

Samples are summed as in `second_moment`: float32 within one, float64 across, in their order; so merging is exact to the same
degree, and `cross_product` with `add_product` gives the bits of one observer. On equal streams the sum equals that of
`SecondMoment`, to the rounding of float32 within a sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbin.calibration.sample import rows_of
from halfbin.calibration.second_moment import LARGEST_NORM
from halfbin.errors import DataError


class CrossMoment:
    """Sums a b^T over tokens of two streams with the same features.

    num_features: of both streams.
    num_tokens:   seen, the same in both.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self._sum = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, x_quantized: Tensor) -> None:
        """Observe one sample of both streams.

        Args:
          x: float [..., num_features], finite: inputs of the layer in the float model.
          x_quantized: shaped alike: its inputs in the model that is quantized so far.

        Raises:
          DataError: shapes that differ, another number of features, or numbers as `SecondMoment.add` refuses them.
        """
        if x.shape[-1:] != (self.num_features,):
            raise DataError(f"activations have shape {list(x.shape)}, expected {self.num_features} features at the end")
        self.add_product(cross_product(x, x_quantized), math.prod(x.shape[:-1]))

    def add_product(self, product: Tensor, num_tokens: int) -> None:
        """Observe one sample of which somebody else made the `cross_product`, float32 [num_features, num_features]."""
        n = self.num_features
        if product.shape != (n, n) or product.dtype != torch.float32:
            raise DataError(f"expected a float32 product [{n}, {n}], got {product.dtype} {list(product.shape)}")
        self._sum += rows_of(product, n)
        self.num_tokens += num_tokens

    def merge(self, later: CrossMoment) -> None:
        """Add what another observer saw of the samples that came after."""
        if later.num_features != self.num_features:
            raise DataError(f"cannot merge {later.num_features} features into {self.num_features}")
        self._sum += later._sum
        self.num_tokens += later.num_tokens

    def divide(self, scale: Tensor) -> None:
        """Make of this the moment of both streams divided by scale, float64 [num_features]."""
        self._sum.div_(scale[:, None]).div_(scale)

    def matrix(self) -> Tensor:
        """sum x x_quantized^T, float64 [num_features, num_features], a row for each feature of x; not a copy."""
        return self._sum


@torch.no_grad()
def cross_product(x: Tensor, x_quantized: Tensor) -> Tensor:
    """What one sample adds to a `CrossMoment`, for a worker to send: x^T x_quantized.

    Args:
      x, x_quantized: float [..., num_features], shaped alike, finite.

    Returns:
      float32 [num_features, num_features].
    """
    if x.shape != x_quantized.shape:
        raise DataError(f"the two streams differ: {list(x.shape)} and {list(x_quantized.shape)} of one sample")
    at_most = LARGEST_NORM / max(math.prod(x.shape[:-1]), 1) ** 0.5
    # By torch: nothing is symmetric here, so the compiled update has no half to leave out, and torch's product reaches 0.9 of
    # its best rate (4096 features, 2,048 tokens); strip by strip, added while in the cache, takes 1.04 to 1.5 times as long.
    return rows_of(x, at_most=at_most).T @ rows_of(x_quantized, at_most=at_most)
