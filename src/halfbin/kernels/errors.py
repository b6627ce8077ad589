"""How far codes lie from the weights they stand for: compiled, or in pieces that stay in the cache, as in `rounding.py`.

Sums run in float64, part by part and then in the order of the parts, so that neither the number of threads nor the largest
weight of a model matters to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import instruction_sets
from halfbin.kernels._native import CodeFormat, compare
from halfbin.kernels.rounding import Piece, compiled, for_each_piece

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
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    size: int,
    *,
    decode: Decode,
    code_format: CodeFormat,
    instruction_set: str | None = None,
) -> ErrorSums:
    """Compare x with scale * (decode(codes) - zero_point), computed in float32.

    Args:
      x: bfloat16, float16 or float32 [num_rows, n], contiguous rows.
      codes: one byte each [num_rows, n].
      scale: float32 [num_rows, ceil(n / size)].
      zero_point: integers shaped like scale, or None for 0.
      size: elements that share a scale: neighbours in a row.
      decode: from codes of any shape to their values in float32, in memory of their own.
      code_format: the same for the compiled loops.
      instruction_set: names a compiled form; by default the best one, or pieces where there is none.
    """
    if instruction_set is None and not compiled():
        return error_sums_in_pieces(x, codes, scale, zero_point, size, decode=decode)
    sums = compare(
        instruction_set or instruction_sets.best(),
        x.detach(),
        size,
        code_format,
        codes.contiguous().view(torch.uint8),
        scale.detach().contiguous(),
        None if zero_point is None else zero_point.to(torch.int32).contiguous(),
        torch.get_num_threads(),
    )
    return ErrorSums(*sums)


def error_sums_in_pieces(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, size: int, *, decode: Decode
) -> ErrorSums:
    """`error_sums` by torch."""
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
