"""Which scale each column of a weight is rounded with, and when it is chosen: before the first column, or group by group."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics.ranges import RangeEstimator
from halfbin.tensor.granularity import spread
from halfbin.tensor.qtensor import fit
from halfbin.tensor.scheme import Scheme

Params: TypeAlias = "tuple[Tensor, Tensor | None]"  # scale and zero point, as `QTensor` holds them


class ColumnScales:
    """The scales of a weight, fitted to it, and the tile that each step of the rounding belongs to.

    scale, zero_point: as `QTensor` holds them; what `RowScales` chooses again is written into them.
    order:   int64 [in]: the column of each step.
    tiles:   the tile along in_features of each step's column.
    groups:  first step -> number of steps of each tile whose scales are chosen again; empty where they stay.
    height:  rows that share those scales, and must be given to one `RowScales`.
    """

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        order: Tensor,
        estimator: RangeEstimator | None,
        *,
        params: Params | None = None,
        recompute: bool = False,
    ) -> None:
        self.scheme, self.estimator, self.order = scheme, estimator, order
        self.shape = (weight.shape[0], weight.shape[1])
        self.scale, self.zero_point = fit(weight, scheme, estimator) if params is None else params
        height, width = (max(size, 1) for size in scheme.granularity.tile(self.shape))
        self.tiles: list[int] = (order // width).tolist()
        # With one tile for all columns, the first column is reached before anything has changed.
        self.groups = _groups(self.tiles, width, scheme) if recompute and width < self.shape[1] else {}
        self.height = height if self.groups else 1


class RowScales:
    """What the rows start <= i < stop of a weight are rounded with, column by column."""

    def __init__(self, scales: ColumnScales, start: int, stop: int) -> None:
        self._scales, self._start, self._stop = scales, start, stop
        self._scale = self._by_tile(scales.scale)
        self._zero = None if scales.zero_point is None else self._by_tile(scales.zero_point)

    def at(self, step: int, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point for the column of this step, each float32 [rows or 1].

        Args:
          step: of the rounding; each one is asked for once, and in their order.
          columns: float32 [in, rows], in the order of rounding. At the first step of a tile whose scales are chosen again, all
            errors so far must have been passed on to all of its columns.
        """
        tile = self._scales.tiles[step]
        if step in self._scales.groups:
            self._choose_again(tile, columns, slice(step, step + self._scales.groups[step]))
        return self._scale[tile], None if self._zero is None else self._zero[tile]

    def table(self, steps: slice, columns: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """`at` for all of these steps: scales and zero points, float32 [tiles, rows or 1], and the tile of each, int64.

        Only the first of them may be the first step of a tile whose scales are chosen again.
        """
        self.at(steps.start, columns)
        return self._scale, self._zero, torch.tensor(self._scales.tiles[steps])

    def _choose_again(self, tile: int, columns: Tensor, steps: slice) -> None:
        in_the_weights_order = torch.argsort(self._scales.order[steps])
        part = columns[steps][in_the_weights_order].T
        scale, zero_point = fit(part, self._scales.scheme, self._scales.estimator)
        self._put(self._scales.scale, self._scale, tile, scale)
        if zero_point is not None and self._scales.zero_point is not None and self._zero is not None:
            self._put(self._scales.zero_point, self._zero, tile, zero_point)

    def _put(self, stored: Tensor, table: Tensor, tile: int, found: Tensor) -> None:
        first = self._start // self._scales.height
        stored[first : first + len(found), tile] = found[:, 0]
        every_row = spread(found, (self._stop - self._start, 1), self._scales.scheme.granularity)
        table[tile] = every_row[:, 0].to(torch.float32)

    def _by_tile(self, params: Tensor) -> Tensor:
        """Of each tile along in_features, float32 [tiles, rows or 1]."""
        height, num_rows = self._scales.scheme.granularity.tile(self._scales.shape)[0], self._scales.shape[0]
        if 1 < height < num_rows:
            params = params.repeat_interleave(height, dim=0)
        if height < num_rows:
            params = params[self._start : self._stop]
        return params.T.to(torch.float32).contiguous()


def _groups(tiles: list[int], width: int, scheme: Scheme) -> dict[int, int]:
    lengths = [len(list(run)) for _, run in itertools.groupby(tiles)]
    if len(lengths) > len(set(tiles)):
        raise SchemeError(
            f"scales of {scheme} can be chosen again only where the columns that share one are rounded together: "
            f"factorise with act_order=False or with group_size={width}"
        )
    return dict(zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True))
