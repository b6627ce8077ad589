"""How far codes lie from the weights they stand for, in pieces that stay in the cache.

The same cut as in `rounding.py`. Sums run in float64, piece by piece and then in the order of the pieces, so that neither the
number of threads nor the largest weight of a model matters to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels.rounding import Piece, for_each_piece

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Over all elements: the sum of x^2, the sum of (x_hat - x)^2, the largest |x_hat - x|."""

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        """Those of both parts together; NaN stays NaN."""
        largest = max(self.max_abs, other.max_abs)
        if math.isnan(self.max_abs) or math.isnan(other.max_abs):
            largest = math.nan
        return ErrorSums(self.signal + other.signal, self.noise + other.noise, largest)


def error_sums(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, size: int, *, decode: Decode
) -> ErrorSums:
    """Compare x with scale * (decode(codes) - zero_point), computed in float32.

    Args:
      x: bfloat16, float16 or float32 [num_rows, n], contiguous rows.
      codes: [num_rows, n].
      scale: float32 [num_rows, ceil(n / size)].
      zero_point: integers shaped like scale, or None for 0.
      size: elements that share a scale: neighbours in a row.
      decode: from codes of any shape to their values in float32, in memory of their own.
    """
    zeros = None if zero_point is None else zero_point.to(torch.float32)
    found: dict[tuple[int, int], ErrorSums] = {}

    def compare(piece: Piece, numbers: Tensor) -> None:
        x_hat = decode(codes[piece.rows, piece.columns]).view(numbers.shape)
        if zeros is not None:
            x_hat.sub_(zeros[piece.rows, piece.tiles, None])
        x_hat.mul_(scale[piece.rows, piece.tiles, None])
        signal = _sum_of_squares(numbers)
        move = x_hat.sub_(numbers)
        found[piece.rows.start, piece.columns.start] = ErrorSums(
            signal, _sum_of_squares(move), float(move.abs_().max())
        )

    for_each_piece(x.detach(), size, compare)
    return sum((found[key] for key in sorted(found)), ErrorSums())


def _sum_of_squares(x: Tensor) -> float:
    wide = x.flatten().double()
    return float(torch.dot(wide, wide))
