"""X^T X over a stream of activations: what GPTQ asks of the data.

A sample is a chunk: within it the products are summed in float32, by a compiled symmetric rank-k update (`kernels/moments.py`)
or, where that refuses, by the machine's matrix product; samples are added in float64, in their order. What that means for
splitting the work, as long as a sample stays whole:

- To the bit: chunk products that workers made with `upper_product`, added in the order of the samples by `add_product`, give
  the bits of one observer that saw the samples itself. So does an observer that is handed from worker to worker, and `merge`
  when it adds one sample, or adds to an observer that saw none.
- To the rounding of float64 additions: any other `merge`, because (a + b) + (c + d) is not ((a + b) + c) + d. Either way, a sum
  of m samples is off by at most m * 2**-53 of the sum of the magnitudes that were added.

Only strips on and above the diagonal are kept: strip i holds the rows from i * STRIP on, from their diagonal to the right. Of
4096 features these are 55 % of all, and 73 MB. Each sample passes over the whole sum once, whatever its length: where time
matters, a sample should hold a thousand tokens or more.

Tried in vain: sums of squares by channel to find NaN (a quarter of all the time); torch's product of each strip on threads of
their own (0.72 of the rate of torch's product, 0.88 where torch shares them out, on two threads of one Zen 4 core).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfbin.calibration.sample import rows_of
from halfbin.errors import DataError
from halfbin.kernels import moments

STRIP = 384
ENERGY_ROWS = 512  # of a weight that are multiplied at once
LARGEST_NORM = 2.0**60  # of a channel over a sample: all products stay far inside float32


class SecondMoment:
    """Sums x x^T over tokens.

    num_features: in_features of the layer.
    num_tokens:   tokens seen.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self._strips = [
            torch.zeros(rows.stop - rows.start, num_features - rows.start, dtype=torch.float64, device=device)
            for rows in _strips(num_features)
        ]

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Observe one sample.

        Args:
          x: float [..., num_features], finite.

        Raises:
          DataError: another number of features, or NaN, infinity or numbers whose products float32 cannot sum.
        """
        rows = _summable(x, self.num_features)
        if moments.refuses(rows) is None:
            moments.add_products(rows, self._strips)
        else:
            for strip, product in zip(self._strips, _products(rows), strict=True):
                strip.add_(product)
        self.num_tokens += len(rows)

    @torch.no_grad()
    def add_product(self, product: Tensor, num_tokens: int) -> None:
        """Observe one sample of which somebody else made the `upper_product`.

        Args:
          product: float32 [num_features, num_features], finite.
          num_tokens: of the sample.

        Raises:
          DataError: another number of features, another type, NaN or infinity.
        """
        n = self.num_features
        if product.shape != (n, n) or product.dtype != torch.float32:
            raise DataError(f"expected a float32 product [{n}, {n}], got {product.dtype} {list(product.shape)}")
        rows_of(product, n)
        for strip, rows in zip(self._strips, _strips(n), strict=True):
            strip.add_(product[rows, rows.start :])
        self.num_tokens += num_tokens

    def merge(self, later: SecondMoment) -> None:
        """Add what another observer saw of the samples that came after."""
        if later.num_features != self.num_features:
            raise DataError(f"cannot merge {later.num_features} features into {self.num_features}")
        for strip, more in zip(self._strips, later._strips, strict=True):
            strip.add_(more)
        self.num_tokens += later.num_tokens

    def divide(self, scale: Tensor) -> None:
        """Make of this the second moment of x / scale, float64 [num_features]."""
        for strip, rows in zip(self._strips, _strips(self.num_features), strict=True):
            strip.div_(scale[rows, None]).div_(scale[rows.start :])

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """sum x x^T, [num_features, num_features] in memory of its own, symmetric to the bit."""
        n = self.num_features
        whole = torch.empty(n, n, dtype=dtype, device=self._strips[0].device if n else None)
        for strip, rows in zip(self._strips, _strips(n), strict=True):
            whole[rows, rows.start :] = strip
            whole[rows.start :, rows] = strip.T
            square = strip[:, : len(strip)].triu()
            whole[rows, rows] = (square + square.triu(1).T).to(dtype)
        return whole

    def diagonal(self) -> Tensor:
        """The sum of squares of each channel, float64 [num_features]."""
        parts = [strip.diagonal() for strip in self._strips]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def energy(self, weight: Tensor) -> float:
        """||X weight^T||^2, the sum over all tokens and outputs, without the matrix: trace(weight M weight^T).

        Products are made in float32, for the upper half of M only, and added in float64 for each row of the weight.

        Args:
          weight: float32 [out, num_features].
        """
        total = 0.0
        for strip, rows in zip(self._strips, _strips(self.num_features), strict=True):
            half = strip.to(torch.float32)
            half[:, : len(strip)].triu_()
            half.diagonal().mul_(0.5)
            for part in torch.split(weight, ENERGY_ROWS):
                seen = torch.mm(part[:, rows], half).mul_(part[:, rows.start :])
                total += 2.0 * float(seen.sum(1).double().sum())
        return total

    def forget(self) -> None:
        """Give the sums' memory back; only `num_tokens` can be asked from here on."""
        self._strips = []


def sum_bytes(num_features: int) -> int:
    """What a `SecondMoment` of so many features holds."""
    return sum(8 * (rows.stop - rows.start) * (num_features - rows.start) for rows in _strips(num_features))


@torch.no_grad()
def upper_product(x: Tensor) -> Tensor:
    """What one sample adds to a `SecondMoment`, for a worker to send: the upper triangle of x^T x.

    Args:
      x: float [..., num_features], finite.

    Returns:
      float32 [num_features, num_features], 0 below the diagonal.

    Raises:
      DataError: NaN, infinity or numbers whose products float32 cannot sum.
    """
    rows = _summable(x, None)
    if moments.refuses(rows) is None:
        return moments.upper_product(rows)
    n = rows.shape[1]
    upper = torch.zeros(n, n, device=rows.device)
    for part, product in zip(_strips(n), _products(rows), strict=True):
        upper[part, part.start :] = product.triu()
    return upper


def _strips(num_features: int) -> list[slice]:
    starts = range(0, num_features, STRIP)
    return [slice(start, min(start + STRIP, num_features)) for start in starts]


def _products(rows: Tensor) -> Iterator[Tensor]:
    """Each strip of x^T x, float32 [strip, num_features - start]; what lies below the diagonal is not needed."""
    return (rows[:, part].T @ rows[:, part.start :] for part in _strips(rows.shape[1]))


def _summable(x: Tensor, num_features: int | None) -> Tensor:
    num_tokens = math.prod(x.shape[:-1])
    return rows_of(x, num_features, at_most=LARGEST_NORM / max(num_tokens, 1) ** 0.5)
