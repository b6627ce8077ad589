"""How the numbers of a stream of activations are distributed, whatever their size turns out to be.

Bins are equally wide and lie on both sides of 0, as many on each. The limit is the smallest power of two above every |x| so
far; when a larger one comes, the limit doubles and neighbouring bins merge:

    bin         0       1       2       3        num_bins = 2
    holds    (-2w,-w]  (-w,0)  (0,w)  [w,2w)     w = limit / num_bins; zeros are counted apart

Since w is a power of two, the bin of a number is found without rounding, and a number is in the merged bin exactly when it is
in one of the two. So the counts depend on the numbers only: not on their order, nor on how the stream was cut into samples or
between observers. Numbers below 2**-64 are counted in the bins next to 0 however small all others are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbin.calibration.histogram_ranges import Histogram, range_of
from halfbin.calibration.sample import rows_of
from halfbin.errors import DataError, SchemeError
from halfbin.numerics.affine import Grid
from halfbin.numerics.ranges import ESTIMATORS, RangeEstimator

LOWEST_EXPONENT = -64  # of the limit: bin widths stay normal float32 numbers
_CHUNK = 1 << 20  # numbers that are sorted into bins at once: 8 MiB of bin numbers


class ActivationHistogram:
    """Counts the numbers of all channels together. Merging two observers is exact.

    num_features: channels.
    num_bins:     for each sign, a power of two. More than half of them lie below the largest |x|.
    num_tokens:   tokens seen.
    """

    def __init__(self, num_features: int, num_bins: int = 2048, *, device: torch.device | str = "cpu") -> None:
        if num_bins < 2 or num_bins & (num_bins - 1):
            raise SchemeError(f"num_bins={num_bins} must be a power of two from 2 on, or bins could not merge exactly")
        self.num_features = num_features
        self.num_bins = num_bins
        self.num_tokens = 0
        self._exponent = LOWEST_EXPONENT
        self._counts = torch.zeros(2 * num_bins, dtype=torch.int64, device=device)
        self._num_zeros = 0
        self._minimum, self._maximum = 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Observe one sample: float [..., num_features], finite.

        Raises:
          DataError: another number of features, or NaN or infinity, with the channel.
        """
        rows = rows_of(x, self.num_features)
        if not rows.numel():
            return
        self._reach(*(float(end) for end in torch.aminmax(rows)))
        for part in torch.split(rows.flatten(), _CHUNK):
            self._count(part)
        self.num_tokens += len(rows)

    def merge(self, later: ActivationHistogram) -> None:
        """Add what another observer saw."""
        if (later.num_features, later.num_bins) != (self.num_features, self.num_bins):
            raise DataError(
                f"cannot merge {later.num_features} features in {later.num_bins} bins into {self.num_features} in "
                f"{self.num_bins}"
            )
        self._reach(later._minimum, later._maximum)
        self._counts += _doubled(later._counts, self._exponent - later._exponent)
        self._num_zeros += later._num_zeros
        self.num_tokens += later.num_tokens

    def _reach(self, minimum: float, maximum: float) -> None:
        """Double the limit until it is above both ends."""
        self._minimum, self._maximum = min(self._minimum, minimum), max(self._maximum, maximum)
        absmax = max(-self._minimum, self._maximum, 2.0 ** (LOWEST_EXPONENT - 1))  # 0 has the exponent 0
        exponent = math.frexp(absmax)[1]
        self._counts = _doubled(self._counts, exponent - self._exponent)
        self._exponent = exponent

    def _count(self, x: Tensor) -> None:
        steps = (x.abs() / self.bin_width).to(torch.int64)
        bins = torch.where(x < 0, self.num_bins - 1 - steps, self.num_bins + steps)
        self._counts += torch.bincount(bins, minlength=2 * self.num_bins)
        num_zeros = x.numel() - int(torch.count_nonzero(x))
        self._counts[self.num_bins] -= num_zeros
        self._num_zeros += num_zeros

    @property
    def bin_width(self) -> float:
        """The width of a bin, a power of two."""
        return 2.0**self._exponent / self.num_bins

    @property
    def histogram(self) -> Histogram:
        """What was counted, as a value."""
        return Histogram(self._counts.clone(), self._num_zeros, self.bin_width, self._minimum, self._maximum)

    def range(self, grid: Grid, how: RangeEstimator | str) -> tuple[Tensor, Tensor]:
        """The range that one scale for all of them should cover.

        Args:
          grid: what the numbers will be rounded to.
          how: an estimator of `numerics.ranges`, or the name of one with its defaults: minmax, percentile, mse, entropy.

        Returns:
          minimum and maximum, float32 [], minimum <= 0 <= maximum; 0 and 0 where nothing but zeros was seen.

        Raises:
          SchemeError: no such estimator, or entropy for a format that it is not for.
        """
        if isinstance(how, str):
            if how not in ESTIMATORS:
                raise SchemeError(f"no range estimator {how!r}; expected one of {', '.join(ESTIMATORS)}")
            how = ESTIMATORS[how]()
        return range_of(self.histogram, grid, how)


def _doubled(counts: Tensor, times: int) -> Tensor:
    """The counts after the limit was doubled `times` times: int64 [2 * num_bins]."""
    quarter = len(counts) // 4
    for _ in range(times):
        merged = counts.view(-1, 2).sum(dim=1)
        counts = torch.zeros_like(counts)
        counts[quarter : 3 * quarter] = merged
    return counts
