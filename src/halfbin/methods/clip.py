"""Scales for which a layer's outputs suffer least: AWQ's clip search.

The largest weight of a group sets the step of all others. Given up a little, it loses what the others gain; where the balance
lies depends on how large the inputs are that each of them meets. Each tile is searched by itself, over the part of the output
that its columns make: for an error e of its rows, e M e^T with M the block of X^T X that belongs to those columns.

Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978, section 5.1 ("we also apply weight clipping"), and its released
code, which searches the same shrinkage with 512 of the inputs themselves, and leaves the weights of queries and keys alone.
We depart from it:

1. Inputs are seen through X^T X, so that none are kept and all of them count.
2. The range shrinks from the whole one, asymmetric ones each end on its own too; the released code cuts at +-max|w| for both.
3. Under GPTQ the columns still to come make up for a part of each error: `after_correction` says what is left of it.
4. What was never active counts a little (`damping`), so that a weight is not given up because the sample was short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.kernels.threads import in_threads
from halfbin.numerics.affine import Grid
from halfbin.numerics.low_rank import LowRank
from halfbin.tensor.granularity import Region, regions, scale_shape
from halfbin.tensor.qtensor import require_finite
from halfbin.tensor.scheme import Scheme

NUM_CANDIDATES = 21  # 1, 0.975, ..., 0.5
SMALLEST = 0.5
DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ
_CHUNK = 1 << 18  # elements that are rounded at once


def clipped(
    weight: Tensor,
    scheme: Scheme,
    second_moment: Tensor | LowRank,
    *,
    num_candidates: int = NUM_CANDIDATES,
    smallest: float = SMALLEST,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of each tile with the least output error when the weight is rounded to nearest with them.

    The whole range is among the candidates: no tile's own output error is larger than with `fit`. Errors of different tiles
    are taken as if they did not meet in the output. Cost: for every candidate out * in * (columns of a tile) multiplications,
    or out * in * rank: tiles of whole rows want a `LowRank`.

    Args:
      weight: float [out, in], finite.
      scheme: what it will be rounded to.
      second_moment: X^T X of the layer's inputs, float [in, in], symmetric, any positive factor; what `low_rank` makes of it;
        or, if GPTQ is to round with these scales, `after_correction`.
      num_candidates: shares of the whole range that are tried, the whole one included; asymmetric, three times as many.
      smallest: the last of them.
      damping: added to the diagonal of `second_moment`, as a share of its mean.

    Returns:
      scale and zero_point (None when symmetric) as `QTensor` holds them: for `quantize(..., scale=, zero_point=)`, or `gptq`.

    Raises:
      DataError: NaN or infinity in the weight or the second moment.
      SchemeError: shapes that do not fit, or candidates that are none.
    """
    diagonal = second_moment.diagonal if isinstance(second_moment, LowRank) else second_moment.diagonal()
    whole = diagonal if isinstance(second_moment, LowRank) else second_moment
    if weight.ndim != 2 or any(size != weight.shape[1] for size in whole.shape):
        raise SchemeError(f"weight {list(weight.shape)} and second moment {list(whole.shape)} do not fit")
    if num_candidates < 1 or not 0.0 < smallest <= 1.0:
        raise SchemeError(f"num_candidates={num_candidates} must be 1 or more and smallest={smallest} in (0, 1]")
    require_finite(weight)
    if not bool(torch.isfinite(whole).all()):
        raise DataError("the second moment holds NaN or infinity; the inputs it was made of may have overflowed")
    shape = (weight.shape[0], weight.shape[1])
    least = damping * float(diagonal.double().mean()) if shape[1] else 0.0
    shrinkage = torch.linspace(1.0, smallest, num_candidates).tolist()[1:]
    minimum = torch.zeros(scale_shape(shape, scheme.granularity), device=weight.device)
    maximum = torch.zeros_like(minimum)
    for region in regions(shape, scheme.granularity):
        tiles = _Tiles(weight.detach(), region, scheme.grid, _cost(second_moment, region, least), shrinkage)
        tiles.search(minimum[region.tiles], maximum[region.tiles])
    return scheme.grid.params(minimum, maximum)


def after_correction(upper: Tensor, order: Tensor) -> LowRank:
    """What an error of a column costs once GPTQ has moved it onto the columns rounded later: error^2 / U[j, j]^2.

    Args:
      upper: U, float [in, in], upper triangular, and
      order: int64 [in], the column of each step, both as `factorise` gives them.

    Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323, equation 2, with [H^-1]_jj of the columns left = U[j, j]^2.
    """
    rest = torch.empty(len(order), device=upper.device)
    rest[order] = upper.diagonal().to(torch.float32).square().reciprocal()
    return LowRank(rest, rest.new_zeros(len(order), 0))


class _Cost(Protocol):
    """What errors of rows cost the outputs."""

    def __call__(self, error: Tensor) -> Tensor:
        """float32 [column tiles, rows, width], which may be overwritten, to float64 [column tiles, rows]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Exact:
    blocks: Tensor  # of M, float32 [column tiles, width, width]

    def __call__(self, error: Tensor) -> Tensor:
        return torch.bmm(error, self.blocks).mul_(error).sum(2, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _Approximate:
    rest: Tensor  # float32 [column tiles, width, 1]
    factor: Tensor  # float32 [column tiles, width, rank]

    def __call__(self, error: Tensor) -> Tensor:
        shared = torch.bmm(error, self.factor).square_().sum(2, dtype=torch.float64)
        return torch.bmm(error.square_(), self.rest).squeeze(2) + shared


def _cost(second_moment: Tensor | LowRank, region: Region, least: float) -> _Cost:
    """Of the region's tiles along the columns; `least` is added to the diagonal."""
    columns, width = region.elements[1], region.tile[1]
    if isinstance(second_moment, LowRank):
        rest = second_moment.rest[columns] + least
        factor = second_moment.factor[columns]
        return _Approximate(rest.view(-1, width, 1), factor.reshape(len(rest) // width, width, factor.shape[1]))
    starts = range(columns.start, columns.stop, width)
    blocks = torch.stack([second_moment[i : i + width, i : i + width] for i in starts]).to(torch.float32)
    blocks.diagonal(dim1=1, dim2=2).add_(least)
    return _Exact(blocks)


class _Tiles:
    """The search over the tiles of one region: [row tiles, height, column tiles, width]."""

    def __init__(self, weight: Tensor, region: Region, grid: Grid, cost: _Cost, shrinkage: Sequence[float]) -> None:
        (height, width), part = region.tile, weight[region.elements]
        self._tiles = part.reshape(part.shape[0] // height, height, part.shape[1] // width, width)
        self._grid, self._cost, self._shrinkage = grid, cost, shrinkage

    def search(self, minimum: Tensor, maximum: Tensor) -> None:
        """Write the ranges found into minimum and maximum, float32 [row tiles, column tiles]."""
        step = max(_CHUNK // max(self._tiles[0].numel(), 1), 1)

        def work(starts: Sequence[int]) -> None:
            for start in starts:
                part = slice(start, start + step)
                low, high = self._best(self._tiles[part].permute(2, 0, 1, 3).to(torch.float32).contiguous())
                minimum[part], maximum[part] = low.T, high.T

        in_threads(range(0, len(self._tiles), step), work)

    def _best(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Of tiles [column tiles, row tiles, height, width]: the best ends, float32 [column tiles, row tiles]."""
        low, high = tiles.amin((2, 3)).clamp(max=0.0), tiles.amax((2, 3)).clamp(min=0.0)
        best = self._error(tiles, low, high)
        both = [(True, True)] if self._grid.symmetric else [(True, True), (True, False), (False, True)]
        for shrink_low, shrink_high in both:
            start_low, start_high = low, high
            for share in self._shrinkage:
                candidate = (
                    start_low * share if shrink_low else start_low,
                    start_high * share if shrink_high else start_high,
                )
                error = self._error(tiles, *candidate)
                better = error < best
                best = torch.where(better, error, best)
                low, high = torch.where(better, candidate[0], low), torch.where(better, candidate[1], high)
        return low, high

    def _error(self, tiles: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Of the outputs, float64 [column tiles, row tiles], when each tile is rounded over its range."""
        scale, zero_point = self._grid.params(low, high)
        scale = scale.to(torch.float32)[..., None, None]
        zero_point = None if zero_point is None else zero_point[..., None, None]
        total = torch.zeros(low.shape, dtype=torch.float64, device=low.device)
        rows = max(_CHUNK // max(tiles[:, :, 0].numel(), 1), 1)
        for part in torch.split(tiles, rows, dim=2):
            w_hat = self._grid.decode(self._grid.encode(part, scale, zero_point), scale, zero_point)
            costs = self._cost(w_hat.sub_(part).flatten(1, 2))
            total += costs.view(part.shape[:3]).sum(2)
        return total
