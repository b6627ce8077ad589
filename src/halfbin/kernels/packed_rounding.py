"""Round to nearest in one pass, from weights to what a file holds: scales, codes as dense bits, and how far off they are.

`rounding.py` and `errors.py` give codes of a byte each and read them again; here they never leave the registers (4 bits) or the
nearest cache (other widths). The bits are the same.

    x           [num_rows, n]       bfloat16, float16 or float32, contiguous rows
    scale       [num_rows, tiles]   tiles = ceil(n / size): the last tile of a row may be shorter
    zero_point  [num_rows, tiles]   int32, or None for 0
    packed      [num_rows, bytes]   uint8: code i of a row, counted from `lowest`, lies in bits [i * bits, i * bits + bits) of
                                    its bytes, least significant first; what follows the last code is 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import instruction_sets
from halfbin.kernels._native import Covers, fit_round_and_pack
from halfbin.kernels.errors import ErrorSums
from halfbin.kernels.rounding import Encoder, Fit, num_tiles


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Shaped as above; `sums` is None where they were not asked for."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sums: ErrorSums | None


def fit_round_and_pack_rows(
    x: Tensor,
    size: int,
    fit: Fit,
    encoder: Encoder,
    *,
    bits: int,
    lowest: int,
    row_bytes: int | None = None,
    compare: bool = True,
    instruction_set: str | None = None,
) -> PackedRows | None:
    """Codes under scales and zero points that cover the whole range of every tile; None when an element is NaN or infinite.

    Needs `rounding.compiled()`.

    Args:
      x: as above; not empty.
      size: elements that share a scale: neighbours in a row.
      fit: how scales and zero points follow from the range of a tile.
      encoder: how elements in steps become codes.
      bits: 1 to 8; every code of the encoder, counted from `lowest`, fits into them.
      lowest: the code that is stored as 0.
      row_bytes: of a packed row; by default as many as the codes fill, ceil(n * bits / 8).
      compare: whether to sum up errors.
      instruction_set: names a compiled form; by default the best one.
    """
    shape = (x.shape[0], num_tiles(x, size))
    packed = torch.empty(x.shape[0], row_bytes or -(-x.shape[1] * bits // 8), dtype=torch.uint8)
    scale = torch.empty(shape, dtype=fit.scale_dtype)
    zero_point = torch.empty(shape, dtype=torch.int32) if fit.covers == Covers.RANGE else None
    sums = fit_round_and_pack(
        instruction_set or instruction_sets.best(),
        x.detach(),
        size,
        encoder.format,
        fit.rule,
        packed,
        bits,
        lowest,
        scale.view(torch.uint8),
        zero_point,
        compare,
        torch.get_num_threads(),
    )
    return None if sums is None else PackedRows(packed, scale, zero_point, ErrorSums(*sums) if compare else None)
