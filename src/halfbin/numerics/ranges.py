"""Range estimators: which interval of values the codes should cover. One scale is chosen per row of `tiles`.

Each estimator is a small frozen value that is called with

    tiles: float [num_tiles, tile_size], the elements that share one scale in a row
    grid:  the values they will be rounded to

and returns (minimum, maximum), each float [num_tiles], with minimum <= 0 <= maximum. It never sees shapes, names or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import working


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
