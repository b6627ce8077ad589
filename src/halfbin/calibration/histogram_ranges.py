"""The estimators of `numerics.ranges` on a histogram: a bin stands for all numbers in it.

minmax       exact: the histogram keeps both ends.
percentile   nearest rank, at the outer edge of the bin that holds it: no more clips than was asked for.
mse          the same candidates; each bin's centre is rounded, and its squared error counts as often as the bin.
entropy      the histogram of |x| is this one, folded at 0, up to the bin of the largest |x|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics.affine import Grid
from halfbin.numerics.ranges import Entropy, MeanSquaredError, MinMax, Percentile, RangeEstimator


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of numbers in equal bins on both sides of 0.

    counts:    int64 [2 * num_bins]: bin i holds numbers from i - num_bins to i + 1 - num_bins, times bin_width; the end
               farther from 0 belongs to the next bin. Zeros are in none.
    num_zeros: zeros, exactly.
    bin_width: of every bin.
    minimum:   the lowest number, or 0.
    maximum:   the highest number, or 0.
    """

    counts: Tensor
    num_zeros: int
    bin_width: float
    minimum: float
    maximum: float

    @property
    def negative(self) -> Tensor:
        """Counts of negative numbers, from 0 outwards: int64 [num_bins]."""
        return self.counts[: len(self.counts) // 2].flip(0)

    @property
    def positive(self) -> Tensor:
        """Counts of positive numbers, from 0 outwards: int64 [num_bins]."""
        return self.counts[len(self.counts) // 2 :]


def range_of(histogram: Histogram, grid: Grid, how: RangeEstimator) -> tuple[Tensor, Tensor]:
    """The range that one scale should cover: float32 [] each.

    Raises:
      SchemeError: an estimator that is not defined on histograms, or one that the grid does not fit.
    """
    if histogram.minimum == histogram.maximum:  # nothing, or zeros
        return torch.zeros(()), torch.zeros(())
    match how:
        case MinMax():
            minimum, maximum = histogram.minimum, histogram.maximum
        case Percentile():
            minimum, maximum = _percentile(histogram, how)
        case MeanSquaredError():
            minimum, maximum = _least_squares(histogram, grid, how)
        case Entropy():
            minimum, maximum = _least_divergence(histogram, grid)
        case _:
            raise SchemeError(f"{how} is not defined on histograms: use minmax, percentile, mse or entropy")
    return torch.tensor(minimum, dtype=torch.float32), torch.tensor(maximum, dtype=torch.float32)


def _percentile(histogram: Histogram, how: Percentile) -> tuple[float, float]:
    size = int(histogram.counts.sum()) + histogram.num_zeros
    clipped = size - how.rank(size)  # numbers that may lie beyond either end
    low = -min(_outer_edge(histogram.negative, clipped) * histogram.bin_width, -histogram.minimum)
    high = min(_outer_edge(histogram.positive, clipped) * histogram.bin_width, histogram.maximum)
    return (low, high) if low < high else (histogram.minimum, histogram.maximum)


def _outer_edge(counts: Tensor, clipped: int) -> int:
    """How many bins from 0 outwards to keep, so that at most `clipped` numbers lie beyond."""
    beyond = counts.flip(0).cumsum(0)  # of the outermost bin, the outermost two, ...
    return len(counts) - int((beyond <= clipped).sum())


def _least_squares(histogram: Histogram, grid: Grid, how: MeanSquaredError) -> tuple[float, float]:
    filled = histogram.counts.nonzero().flatten().cpu()
    counts = histogram.counts.cpu()[filled].to(torch.float64)
    centres = (filled - len(histogram.counts) // 2 + 0.5).to(torch.float64) * histogram.bin_width
    centres = centres.clamp_(histogram.minimum, histogram.maximum).to(torch.float32)

    def error(minimum: Tensor, maximum: Tensor) -> Tensor:
        scale, zero_point = grid.params(minimum, maximum)
        x_hat = grid.decode(grid.encode(centres, scale, zero_point), scale, zero_point)
        return (counts * (x_hat - centres).to(torch.float64).square_()).sum().reshape(1)

    ends = torch.tensor([histogram.minimum]), torch.tensor([histogram.maximum])
    minimum, maximum = how.search(*ends, grid, error)
    return float(minimum), float(maximum)


def _least_divergence(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    how = Entropy(len(histogram.positive))
    low, levels = how.levels(torch.tensor([histogram.minimum]), torch.tensor([histogram.maximum]), grid)
    minimum, maximum = float(low), histogram.maximum
    magnitudes = histogram.positive + (histogram.negative if minimum < 0 else 0)
    absmax = max(-minimum, maximum)
    num_bins = min(int(absmax / histogram.bin_width) + 1, len(magnitudes))
    if num_bins < 2:
        return minimum, maximum
    counts = magnitudes[:num_bins].to(torch.float64, copy=True)
    counts[0] = counts[1]  # numbers near 0 are exact under every threshold, as in `numerics.ranges`
    threshold = float(how.num_kept(counts.unsqueeze(0), int(levels))) * histogram.bin_width
    return max(minimum, -threshold), min(maximum, threshold)
