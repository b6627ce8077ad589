"""Rounding one column: the plain way through `Grid`, and for integers the same operations with fewer passes and no checks.

The loop over columns is made of short calls, 5 us each at the least, so their number is its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import IntegerFormat

Rounding = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""From a column, float32 [rows], its scale and zero point, float32 [rows or 1], and where its codes go, code_dtype [rows], to
the nearest values, float32 [rows]; those may be overwritten by the next call."""


def rounding(grid: Grid) -> Rounding:
    """The fastest rounding there is for a grid; all give the bits of `plain`."""
    return integers(grid.format) if isinstance(grid.format, IntegerFormat) else plain(grid)


def plain(grid: Grid) -> Rounding:
    """`Grid.encode` and `Grid.decode`."""

    def round_column(column: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor) -> Tensor:
        found = grid.encode(column, scale, zero)
        codes.copy_(found)
        return grid.decode(found, scale, zero)

    return round_column


def integers(fmt: IntegerFormat) -> Rounding:
    """Integer formats; NaN is the caller's to find."""
    buffer = torch.empty(0)

    def round_column(column: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor) -> Tensor:
        nonlocal buffer
        if buffer.shape != column.shape or buffer.device != column.device:
            buffer = torch.empty_like(column)
        steps = torch.div(column, scale, out=buffer).round_()
        if zero is not None:
            steps.add_(zero)
        steps.clamp_(fmt.qmin, fmt.qmax)
        codes.copy_(steps)
        if zero is not None:
            steps.sub_(zero)
        return steps.mul_(scale)

    return round_column
