"""GPTQ: round the columns of a weight one after the other, and let those still to come make up for each error.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", https://arxiv.org/abs/2210.17323, section 3 and algorithm 1; the update is Optimal Brain Surgeon's.

Column j is rounded, its error divided by U[j, j], and that times U[j, j:] taken from the columns from j on; `factor.py` makes
U. Errors are not passed on to all the rest at once. A span of columns is halved, again and again: when its left half is
rounded, one matrix product passes the errors on to its right half. Spans of at most `leaf` columns are rounded column by
column, on a CPU by a compiled loop (`csrc/gptq/`), whose plain form is `_one_by_one`. The paper's "lazy batches" are the same
with two levels; large products are nearer to what the machine can do.

Rows of the weight do not know each other: threads have shares of them.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.kernels import instruction_sets
from halfbin.kernels._native import round_columns
from halfbin.kernels.rounding import compiled
from halfbin.kernels.threads import in_turns
from halfbin.methods.column_rounding import rounding
from halfbin.methods.factor import Factor
from halfbin.methods.gptq_scales import ColumnScales, Params, RowScales
from halfbin.numerics.affine import Grid
from halfbin.numerics.ranges import RangeEstimator
from halfbin.tensor.qtensor import QTensor, require_finite
from halfbin.tensor.rowwise import encoder
from halfbin.tensor.scheme import Scheme

LEAF = 64  # columns that are rounded one by one, each error passed on at once to the rest of them
MOST_COLUMNS = 128  # that the compiled loop takes at a time
SHARE = 2048  # rows of the weight that go through the columns together


def gptq(
    weight: Tensor,
    scheme: Scheme,
    factor: Factor,
    *,
    estimator: RangeEstimator | None = None,
    params: Params | None = None,
    recompute_scales: bool = False,
    leaf: int = LEAF,
) -> QTensor:
    """Choose codes that keep X @ weight^T, at scales that are fitted to the weight before the first column is rounded.

    Args:
      weight: float [out, in], finite; a weight that is stored [in, out] is passed transposed.
      scheme: what to round to; any format and granularity.
      factor: of the second moment [in, in] of the layer's inputs.
      estimator: chooses the range each scale covers; the whole range by default.
      params: scale and zero point to use instead of fitted ones, as `fit` and `clipped` give them.
      recompute_scales: choose the scales of a group again when its first column is reached, from its columns as the errors so
        far have changed them. The columns that share a scale must be rounded together: `factorise` with `act_order=False`, or
        with `group_size`. One scale for all columns is the same either way.
      leaf: columns that are rounded one by one; changes time and the last bit, not the method. From in_features on, every
        error is passed on to all the rest at once, as the method is defined.

    Raises:
      DataError: NaN or infinity in `weight`, or columns that overflow while errors are passed on.
      SchemeError: shapes that do not fit, or an order that tears groups apart whose scales are to be chosen again.
    """
    if weight.ndim != 2 or weight.shape[1] != len(factor.order):
        raise SchemeError(f"weight {list(weight.shape)} and second moment of {len(factor.order)} features do not fit")
    if params is not None and recompute_scales:
        raise SchemeError("params fixes the scales that recompute_scales would choose again: pass one of them")
    require_finite(weight)
    weight = weight.detach()
    scales = ColumnScales(weight, scheme, factor.order, estimator, params=params, recompute=recompute_scales)
    codes = torch.empty(weight.shape, dtype=scheme.format.code_dtype, device=weight.device)
    place = torch.argsort(factor.order)  # of each column in the order of rounding

    def round_rows(start: int) -> None:
        rows = slice(start, min(start + share, len(weight)))
        # Transposed before it is ordered: so whole columns move, in 0.4 of the time.
        columns = weight[rows].to(torch.float32).T.contiguous()[factor.order]
        loop = _ColumnLoop(columns, factor.upper, scheme.grid, RowScales(scales, rows.start, rows.stop), leaf)
        loop.span(0, len(columns), sorted(scales.groups))
        if not bool(torch.isfinite(columns.sum())):
            raise DataError("the errors that GPTQ passes on left float32's range: use more damping")
        codes[rows] = loop.codes[place].T

    share = _share(len(weight), scales.height) if weight.device.type == "cpu" else len(weight)
    in_turns(range(0, len(weight), share), round_rows)
    zero_point = None if scales.zero_point is None else scales.zero_point.to(torch.int32)
    return QTensor(codes, scales.scale, zero_point, scheme)


def _share(num_rows: int, height: int) -> int:
    """Rows of a share: about `SHARE`, whole tiles, whatever the number of threads, so that bits do not depend on it."""
    return max(-(-SHARE // height) * height, 1)


class _ColumnLoop:
    """The loop over the columns of some rows.

    columns: float32 [in, rows], in the order of rounding, changed at will: columns that are rounded give way to their errors,
             divided by U's diagonal.
    codes:   code_dtype [in, rows].
    """

    def __init__(self, columns: Tensor, upper: Tensor, grid: Grid, scales: RowScales, leaf: int) -> None:
        self._columns, self._upper, self._scales, self._leaf = columns, upper, scales, leaf
        self._pivots = upper.diagonal().tolist()
        self._round = rounding(grid)
        self._compiled = columns.device.type == "cpu" and compiled() and leaf <= MOST_COLUMNS
        self._format = encoder(grid.format).format
        self.codes = torch.empty(columns.shape, dtype=grid.format.code_dtype, device=columns.device)

    def span(self, start: int, stop: int, groups: Sequence[int]) -> None:
        """Round the columns of a span to which all errors before it were passed on.

        Where scales are chosen again, a span is cut only between groups, until it is a single one: so a group is whole, and
        knows all errors before it, when its first column is reached.

        Args:
          start, stop: the span.
          groups: the first steps of all groups, rising; none where no scales are chosen again.
        """
        if stop - start <= self._leaf:
            (self._compiled_loop if self._compiled else self._one_by_one)(start, stop, groups)
            return
        middle = _nearest((start + stop) // 2, groups, start, stop)
        self.span(start, middle, groups)
        errors, upper = self._columns[start:middle], self._upper[start:middle, middle:stop]
        self._columns[middle:stop].addmm_(upper.T, errors, alpha=-1)
        self.span(middle, stop, groups)

    def _compiled_loop(self, start: int, stop: int, groups: Sequence[int]) -> None:
        """The same, from the first column of a group whose scales are chosen again to the next such column at a time."""
        inside = groups[bisect.bisect_right(groups, start) : bisect.bisect_left(groups, stop)]
        for first, last in itertools.pairwise([start, *inside, stop]):
            scale, zero, tiles = self._scales.table(slice(first, last), self._columns)
            round_columns(
                instruction_sets.best(),
                self._columns[first:stop],
                last - first,
                self._upper[first:last, first:stop],
                self._format,
                scale,
                zero,
                tiles,
                self.codes[first:last].view(torch.uint8),
            )

    def _one_by_one(self, start: int, stop: int, groups: Sequence[int]) -> None:
        for step in range(start, stop):
            scale, zero = self._scales.at(step, self._columns)
            column = self._columns[step]
            w_hat = self._round(column, scale, zero, self.codes[step])
            column.sub_(w_hat).div_(self._pivots[step])
            self._columns[step + 1 : stop].addr_(self._upper[step, step + 1 : stop], column, alpha=-1)


def _nearest(middle: int, cuts: Sequence[int], start: int, stop: int) -> int:
    """The cut nearest to the middle with start < cut < stop, or the middle where there is none."""
    after = bisect.bisect_left(cuts, middle)
    inside = [cut for cut in cuts[max(after - 1, 0) : after + 1] if start < cut < stop]
    return min(inside, key=lambda cut: abs(cut - middle), default=middle)
