"""Range estimators: which interval of values the codes should cover. One scale is chosen per row of `tiles`.

Each estimator is a small frozen value that is called with

    tiles: float [num_tiles, tile_size], the elements that share one scale in a row
    grid:  the values they will be rounded to

and returns (minimum, maximum), each float [num_tiles], with minimum <= 0 <= maximum. It never sees shapes, names or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import IntegerFormat, working


class RangeEstimator(Protocol):
    """Chooses the interval that one scale must cover."""

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Float [num_tiles, tile_size] to (minimum, maximum), each [num_tiles]."""
        ...


@dataclass(frozen=True, slots=True)
class MinMax:
    """The whole range: nothing clips.

    Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 3.
    """

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Float [num_tiles, tile_size] to (minimum, maximum), each [num_tiles]."""
        tiles = working(tiles)
        minimum, maximum = tiles.aminmax(dim=1)
        return minimum.clamp(max=0.0), maximum.clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class Percentile:
    """All but the outermost values of each end: nearest rank, so that both ends are elements of the tile.

    `percent` counts from either end: at 99.9 the highest 0.1 % may clip and the lowest 0.1 % too. In tiles of 1000 or
    fewer that is nothing. A tile whose percentiles are both 0 though it is not all zeros keeps its whole range.

    Source: Wu et al. 2020, https://arxiv.org/abs/2004.09602, section 3.3 ("Percentile").
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 50.0 < self.percent <= 100.0:
            raise SchemeError(f"percent={self.percent} must be above 50 and at most 100; 100 is the whole range")

    def rank(self, size: int) -> int:
        """Which of `size` rising elements is the high end, counted from 1; the low end is as far from the other side."""
        # 12 digits are kept: 99.9 / 100 * 1000 is 999.0000000000001 in floating point, and its rank is 999.
        return min(max(math.ceil(round(self.percent / 100 * size, 12)), 1), size)

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Float [num_tiles, tile_size] to (minimum, maximum), each [num_tiles]."""
        tiles = working(tiles)
        size = tiles.shape[1]
        rank = self.rank(size)
        maximum = tiles.kthvalue(rank, dim=1).values.clamp(min=0.0)
        minimum = tiles.kthvalue(size - rank + 1, dim=1).values.clamp(max=0.0)
        lowest, highest = MinMax()(tiles, grid)
        empty = minimum == maximum
        return torch.where(empty, lowest, minimum), torch.where(empty, highest, maximum)


@dataclass(frozen=True, slots=True)
class MeanSquaredError:
    """The range with the least squared rounding error, clipping included, among shrunken whole ranges.

    Both ends shrink together, from the whole range to `smallest` of it; on an asymmetric grid the low end and then the
    high end are searched again on their own. The whole range is among the candidates, so the error is never above that
    of `MinMax`. Every candidate is judged by rounding with it, scale format included.

    Source: Nagel et al. 2021, https://arxiv.org/abs/2106.08295, section 3.1 ("MSE": grid search over the range).
    """

    num_candidates: int = 36
    smallest: float = 0.3

    def __post_init__(self) -> None:
        if self.num_candidates < 1 or not 0.0 < self.smallest <= 1.0:
            raise SchemeError(
                f"num_candidates={self.num_candidates} must be 1 or more and smallest={self.smallest} in (0, 1]"
            )

    @property
    def factors(self) -> list[float]:
        """What ranges are shrunken by, falling; the whole range is not among them."""
        found: list[float] = torch.linspace(1.0, self.smallest, self.num_candidates).tolist()
        return found[1:]

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Float [num_tiles, tile_size] to (minimum, maximum), each [num_tiles]."""
        rows = max(_CHUNK // max(tiles.shape[1], 1), 1)
        found = [self._of_chunk(working(chunk), grid) for chunk in torch.split(tiles, rows)]
        return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])

    def _of_chunk(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return self.search(*MinMax()(tiles, grid), grid, lambda low, high: _squared_error(tiles, low, high, grid))

    def search(
        self, minimum: Tensor, maximum: Tensor, grid: Grid, error: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The candidate with the least error, of each tile.

        Args:
          minimum, maximum: float [num_tiles], the whole ranges.
          grid: says which ends move.
          error: from (minimum, maximum) to what rounding each tile over that range costs, [num_tiles].
        """
        best = error(minimum, maximum)
        ends = [(True, True)] if grid.symmetric else [(True, True), (True, False), (False, True)]
        for shrink_low, shrink_high in ends:
            low, high = minimum, maximum
            for factor in self.factors:
                candidate = (low * factor if shrink_low else low, high * factor if shrink_high else high)
                cost = error(*candidate)
                better = cost < best
                best = torch.where(better, cost, best)
                minimum = torch.where(better, candidate[0], minimum)
                maximum = torch.where(better, candidate[1], maximum)
        return minimum, maximum


_CHUNK = 1 << 20  # elements that are rounded at once: some tens of MiB with everything derived from them


def _squared_error(tiles: Tensor, minimum: Tensor, maximum: Tensor, grid: Grid) -> Tensor:
    """What rounding each tile over its range costs, float64 [num_tiles]: float32 squares would over- and underflow."""
    scale, zero_point = grid.params(minimum, maximum)
    scale = scale.to(tiles.dtype).unsqueeze(1)
    zero_point = None if zero_point is None else zero_point.unsqueeze(1)
    total = torch.zeros(tiles.shape[0], dtype=torch.float64, device=tiles.device)
    for part in torch.split(tiles, _CHUNK, dim=1):
        x_hat = grid.decode(grid.encode(part, scale, zero_point), scale, zero_point, part.dtype)
        total += (x_hat - part).to(torch.float64).square_().sum(dim=1)
    return total


@dataclass(frozen=True, slots=True)
class Entropy:
    """The clipping threshold that keeps most of the distribution of |x|, by Kullback-Leibler divergence.

    For each threshold of i bins: P is the histogram's first i bins with all that clips added to the last one, Q the same
    bins (without what clips) merged into as many levels as |x| has codes and spread back over the bins that were not
    empty. The threshold with the least KL(P || Q) wins; the whole range wins ties. It needs tiles with many elements
    (a histogram of a group of 128 is noise) and more than a few codes.

    Source: Migacz 2017, "8-bit inference with TensorRT", GTC, slides 38-40 (pseudocode). We depart in four things: the
    threshold is the upper edge of its last bin, not half a bin further, so that the whole range is exactly itself; bins
    that the levels cannot share evenly are shared as evenly as possible, not all given to the last level; a candidate
    whose Q misses mass that P has is worth nothing, so that no smoothing constant is needed; and zeros do not count.
    """

    num_bins: int = 2048

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Float [num_tiles, tile_size] to (minimum, maximum), each [num_tiles].

        Raises:
          SchemeError: the format is no integer format, or has more codes than the histogram has bins.
        """
        minimum, maximum = MinMax()(tiles, grid)
        minimum, levels = self.levels(minimum, maximum, grid)
        threshold = torch.empty_like(maximum)
        for num_levels in set(levels.tolist()):
            index = (levels == num_levels).nonzero().flatten()
            for rows in torch.split(index, max(_CHUNK // max(tiles.shape[1], self.num_bins), 1)):
                x = torch.minimum(torch.maximum(working(tiles[rows]), minimum[rows, None]), maximum[rows, None]).abs()
                absmax = x.amax(dim=1)
                kept = self.num_kept(_histogram(x, absmax, self.num_bins), num_levels)
                threshold[rows] = absmax * (kept / self.num_bins).to(absmax.dtype)
        return torch.maximum(minimum, -threshold), torch.minimum(maximum, threshold)

    def levels(self, minimum: Tensor, maximum: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The low ends that count, float [num_tiles], and into how many levels |x| is merged, int64 [num_tiles].

        Args:
          minimum, maximum: float [num_tiles], the whole ranges, with 0.

        Raises:
          SchemeError: the format is no integer format, or has more codes than the histogram has bins.
        """
        fmt = grid.format
        if not isinstance(fmt, IntegerFormat):
            raise SchemeError(f"entropy needs evenly spaced codes, and those of {fmt.name} are not: use mse or minmax")
        num_codes = fmt.qmax - fmt.qmin + 1
        if self.num_bins < num_codes:
            raise SchemeError(f"num_bins={self.num_bins} cannot tell the {num_codes} codes of {fmt.name} apart")
        if fmt.qmin == 0 and grid.symmetric:
            minimum = torch.zeros_like(minimum)  # the codes hold no negative values, so their distribution is no matter
        # |x| has the positive codes of a symmetric grid, and of an asymmetric one all codes or half of them.
        if grid.symmetric:
            return minimum, torch.full(minimum.shape, fmt.qmax + 1, device=minimum.device)
        one_sided = (minimum == 0) | (maximum == 0)
        return minimum, torch.where(one_sided, num_codes, (num_codes + 1) // 2)

    @staticmethod
    def num_kept(histogram: Tensor, levels: int) -> Tensor:
        """How many bins the best threshold keeps, float64 [num_tiles].

        Args:
          histogram: float64 [num_tiles, num_bins], counts of |x| in equal bins from 0 on, the first one like the second.
          levels: into how many the kept ones are merged, at most num_bins.
        """
        num_bins = histogram.shape[1]
        best = torch.full_like(histogram[:, 0], torch.inf)
        kept = torch.full_like(best, num_bins)
        divergence = _Divergence(histogram)
        for num_kept in range(num_bins, levels - 1, -1):
            value = divergence(num_kept, levels)
            better = value < best
            best = torch.where(better, value, best)
            kept = torch.where(better, float(num_kept), kept)
        return kept


def _histogram(magnitude: Tensor, absmax: Tensor, num_bins: int) -> Tensor:
    """Counts of |x| in `num_bins` equal bins from 0 to each row's absmax, float64 [num_tiles, num_bins].

    The first bin takes the second one's count: zeros are exact under every threshold and must not decide which.
    """
    share = magnitude / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
    bins = (share * num_bins).to(torch.int64).clamp_(max=num_bins - 1)
    counts = torch.zeros(magnitude.shape[0], num_bins, dtype=torch.float64, device=magnitude.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    counts[:, 0] = counts[:, 1]
    return counts


class _Divergence:
    """KL(P || Q) for every number of kept bins, from running sums: the cost of one is its levels, not its bins."""

    def __init__(self, histogram: Tensor) -> None:
        self.histogram = histogram
        self.total = histogram.sum(dim=1).clamp_(min=1)  # less only where all is 0
        self.mass = _running_sum(histogram)
        self.filled = _running_sum((histogram > 0).to(torch.float64))
        self.entropy = _running_sum(torch.xlogy(histogram, histogram))

    def __call__(self, num_kept: int, levels: int) -> Tensor:
        """Keep the first `num_kept` bins, merge them into `levels`; float64 [num_tiles], infinite where Q misses P."""
        last = self.histogram[:, num_kept - 1]
        kept = self.mass[:, num_kept]
        clipped = self.total - kept
        # sum of p * log(p) with p = count / total, where the last bin also holds what clips
        counts = self.entropy[:, num_kept - 1] + torch.xlogy(last + clipped, last + clipped)
        own = counts / self.total - self.total.log()
        # sum of p * log(q): a level's mass spreads evenly over those of its bins that are not empty
        edges = torch.arange(levels + 1, device=last.device) * num_kept // levels
        mass = self.mass[:, edges].diff(dim=1)
        log_q = (mass / (self.filled[:, edges].diff(dim=1) * kept.unsqueeze(1))).log()
        weighted = torch.where(mass > 0, mass * log_q, 0.0).sum(dim=1) + torch.where(
            last > 0, clipped * log_q[:, -1], 0.0
        )
        missed = (clipped > 0) & (last == 0)
        return torch.where(missed, torch.inf, own - weighted / self.total)


def _running_sum(x: Tensor) -> Tensor:
    """[n, bins] to [n, bins + 1]: the sum of all bins before each, 0 first."""
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))


ESTIMATORS: dict[str, Callable[[], RangeEstimator]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "entropy": Entropy,
}
