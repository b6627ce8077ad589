"""Where tiles are runs of a row, `quantize` goes through `kernels.rounding`: the same bits, several times as fast.

`rowwise` says whether a tensor and a scheme allow it, and why not. The plain path refuses nothing and remains the arbiter.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import rounding
from halfbin.kernels._native import Covers
from halfbin.kernels.errors import ErrorSums, error_sums
from halfbin.kernels.packed_rounding import fit_round_and_pack_rows
from halfbin.numerics.formats import Format, IntegerFormat, TableFormat
from halfbin.numerics.ranges import MeanSquaredError
from halfbin.tensor.granularity import scale_shape
from halfbin.tensor.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Rowwise:
    """A tensor as rows in which each tile is a run of `size` neighbours, the last one of a row perhaps shorter."""

    rows: Tensor  # [num_rows, n], a view
    size: int
    shape: tuple[int, ...]  # of the tensor
    scheme: Scheme

    def quantize(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Codes, scales and zero points that cover the whole range of each tile; None when not all is finite."""
        found = rounding.fit_and_round_rows(self.rows, self.size, fit_rule(self.scheme), encoder(self.scheme.format))
        if found is None:
            return None
        codes, scale, zero_point = found
        shape = scale_shape(self.shape, self.scheme.granularity)
        return self._codes(codes), scale.view(shape), None if zero_point is None else zero_point.view(shape)

    def quantize_packed(self, row_multiple: int) -> tuple[Tensor, Tensor, Tensor | None, ErrorSums] | None:
        """Packed codes, scales and zero points as `PackedTensor` holds them, and error sums; None where that cannot be."""
        fmt, columns = self.scheme.format, self.shape[-1]
        if not rounding.compiled() or self.rows.shape[1] != columns:
            return None
        num_bytes = -(-columns * fmt.bits // 8)
        found = fit_round_and_pack_rows(
            self.rows,
            self.size,
            fit_rule(self.scheme),
            encoder(fmt),
            bits=fmt.bits,
            lowest=fmt.qmin if isinstance(fmt, IntegerFormat) else 0,
            row_bytes=-(-num_bytes // row_multiple) * row_multiple,
        )
        if found is None or found.sums is None:
            return None
        shape, zero_point = scale_shape(self.shape, self.scheme.granularity), found.zero_point
        packed = found.packed.view(*self.shape[:-1], -1)
        return packed, found.scale.view(shape), None if zero_point is None else zero_point.view(shape), found.sums

    def search(self, estimator: MeanSquaredError) -> tuple[Tensor, Tensor] | None:
        """The ranges that `estimator` chooses, float32, shaped as scales; None without a fast loop, or if not all is finite."""
        fit, coding = fit_rule(self.scheme), encoder(self.scheme.format)
        found = rounding.search_rows(self.rows, self.size, fit, coding, estimator.factors)
        shape = scale_shape(self.shape, self.scheme.granularity)
        return None if found is None else (found[0].view(shape), found[1].view(shape))

    def encode(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes shaped as the tensor; scale and zero_point as `QTensor` holds them."""
        shape = (self.rows.shape[0], -1)
        zeros = None if zero_point is None else zero_point.reshape(shape)
        found = rounding.round_rows(self.rows, scale.reshape(shape), zeros, self.size, encoder(self.scheme.format))
        return self._codes(found)

    def _codes(self, codes: Tensor) -> Tensor:
        return codes.view(self.scheme.format.code_dtype).view(self.shape)

    def error_sums(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> ErrorSums:
        """How far what these codes stand for, in float32, lies from the tensor."""
        shape = (self.rows.shape[0], -1)
        zeros = None if zero_point is None else zero_point.reshape(shape)
        return error_sums(
            self.rows,
            codes.reshape(self.rows.shape),
            scale.to(torch.float32).reshape(shape),
            zeros,
            self.size,
            decode=self.scheme.format.decode,
            code_format=encoder(self.scheme.format).format,
        )


def rowwise(x: Tensor, scheme: Scheme) -> Rowwise | str:
    """`x` as rows of tiles, or why it is none, or why there is no fast loop for it."""
    shape = tuple(x.shape)
    tile = scheme.granularity.tile(shape)
    if not x.is_contiguous():
        return f"the tensor is not contiguous: shape {list(shape)}, strides {list(x.stride())}"
    axis = next((i for i, t in enumerate(tile) if t > 1), len(tile) - 1)
    if axis < 0 or tile[axis + 1 :] != shape[axis + 1 :]:
        return f"a tile of {list(tile)} in {list(shape)} is no run of neighbours within a row"
    inner = math.prod(shape[axis + 1 :])
    rows = x.reshape(math.prod(shape[:axis]), shape[axis] * inner)
    return rounding.refuses(rows) or Rowwise(rows, tile[axis] * inner, shape, scheme)


def fit_rule(scheme: Scheme) -> rounding.Fit:
    """How the scales of a scheme follow from whole ranges."""
    grid, covers = scheme.grid, Covers.BOTH_ALIKE
    if not grid.symmetric:
        covers = Covers.RANGE
    elif grid.format.minimum == 0:  # unsigned codes without zero point hold no negative values
        covers = Covers.POSITIVE
    return rounding.Fit(grid.params, covers, grid.steps, scheme.scale_format.dtype)


@functools.cache
def encoder(fmt: Format) -> rounding.Encoder:
    """How numbers in steps become codes of a format."""
    if isinstance(fmt, IntegerFormat):
        return rounding.to_integers(fmt.qmin, fmt.qmax, fmt.code_dtype)
    values = fmt.decode(fmt.codes).tolist()
    if isinstance(fmt, TableFormat):
        return rounding.to_table(_boundaries(fmt), values)
    return rounding.to_floats(
        fmt.encode,
        exponent_bits=fmt.exponent_bits,
        mantissa_bits=fmt.mantissa_bits,
        bias=fmt.bias,
        largest=fmt.maximum,
        values=values,
    )


def _boundaries(fmt: TableFormat) -> Tensor:
    """The largest float32 that still belongs to the lower of each two neighbours; a tie belongs to the even code."""
    values = torch.tensor(fmt.table, dtype=torch.float64)
    midpoints = (values[1:] + values[:-1]) / 2
    nearest = midpoints.to(torch.float32)
    down = torch.full_like(nearest, -torch.inf)
    largest = torch.where(nearest > midpoints, torch.nextafter(nearest, down), nearest)
    upper_wins_tie = (torch.arange(len(midpoints)) % 2 == 1) & (largest == midpoints)
    return torch.where(upper_wins_tie, torch.nextafter(largest, down), largest)
