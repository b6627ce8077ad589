"""Where a weight's elements lie between the values that its codes can take."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.numerics.formats import Format, working
from halfbin.run.report import Histogram
from halfbin.run.slabs import row_step, slabs
from halfbin.tensor.granularity import spread
from halfbin.tensor.mixed import MixedTensor
from halfbin.tensor.qtensor import QTensor

NUM_BINS = 128
ITEM_BYTES = 16  # of an element while it is counted: an int64 bin and two floats


def weight_histogram(weight: Tensor, what: QTensor | MixedTensor, *, num_bins: int = NUM_BINS) -> Histogram:
    """Count the elements of `weight` in steps of their own scale, so that all groups share one picture.

    Args:
      weight: float [*shape], as it was before rounding.
      what: what it was rounded to, of the same shape; columns that are kept in floating point are not counted.
      num_bins: equally wide bins, reaching half a gap beyond the outermost levels; what lies further out (it was
        clipped) counts in the outermost bin.
    """
    q = what.q if isinstance(what, MixedTensor) else what
    levels = finite_levels(q.scheme.format)
    low = levels[0] - (levels[1] - levels[0]) / 2
    high = levels[-1] + (levels[-1] - levels[-2]) / 2
    counts = torch.zeros(num_bins, dtype=torch.int64)
    for rows in slabs(q.shape, row_step("rtn", q.shape, q.scheme.granularity), itemsize=ITEM_BYTES):
        steps = _in_steps(weight[rows], q.rows(rows.start, rows.stop))
        counted = steps[what.rounded[rows]] if isinstance(what, MixedTensor) else steps.flatten()
        bins = ((counted - low) * (num_bins / (high - low))).floor_().clamp_(0, num_bins - 1)
        counts += torch.bincount(bins.to(torch.int64), minlength=num_bins)
    edges = torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), levels=tuple(levels))


def _in_steps(weight: Tensor, q: QTensor) -> Tensor:
    steps = working(weight) / spread(q.scale.to(working(weight).dtype), q.shape, q.scheme.granularity)
    return steps if q.zero_point is None else steps + spread(q.zero_point, q.shape, q.scheme.granularity)


def finite_levels(fmt: Format) -> list[float]:
    """Every finite value that a code of `fmt` stands for, rising, each once (-0 and 0 are one value)."""
    values = fmt.decode(fmt.codes, torch.float64)
    return sorted({float(value) + 0.0 for value in values[values.isfinite()]})
