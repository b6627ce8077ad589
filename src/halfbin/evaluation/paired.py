"""Is one result better than another, or is it the text? Both are measured on the same windows, and differences are taken there.

Windows differ far more from each other than two roundings of one model do on the same window. So the difference of two means
is uncertain by what the differences window by window vary, not by what each mean does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError

NUM_RESAMPLED = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the interval that holds it in 95 of 100 such texts."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is certain."""
        return self.low > 0 or self.high < 0


def paired_difference(a: Tensor, b: Tensor, *, seed: int = 0) -> Interval:
    """The mean of a - b over windows, with a 95 % bootstrap interval.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile intervals, windows resampled in pairs.

    Args:
      a, b: float [num_windows], of the same windows; at least two.
      seed: of the resampling.

    Raises:
      DataError: shapes differ, or fewer than two windows.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise DataError(
            f"a paired difference needs the same windows, 2 or more; got {list(a.shape)} and {list(b.shape)}"
        )
    differences = a.double() - b.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(a), (NUM_RESAMPLED, len(a)), generator=generator)
    low, high = torch.quantile(differences[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(differences.mean())
    return Interval(mean, low, high) if math.isfinite(mean) else Interval(mean, -math.inf, math.inf)
