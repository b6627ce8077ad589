"""Weights rounded to nearest straight into what files hold: codes that already lie as dense bits, and how far they are off."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfbin.kernels.errors import ErrorSums
from halfbin.tensor.rowwise import rowwise
from halfbin.tensor.scheme import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """What a `QTensor` holds, but for its codes, which are packed.

    packed:            uint8 [*shape[:-1], bytes]: each row a dense stream of codes, lowest bits first, counted from `qmin`
                       where they are integers; what follows the last one is 0.
    scale, zero_point: as `QTensor` has them.
    shape:             of the tensor that the codes stand for.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]


def quantize_packed(x: Tensor, scheme: Scheme, *, row_multiple: int = 1) -> tuple[PackedTensor, ErrorSums] | None:
    """`quantize` with the whole range of every tile, packed, and `rounding_sums`, in one pass over `x`: the same bits.

    Args:
      x: float, of any shape that the scheme's granularity accepts.
      scheme: what to round to.
      row_multiple: rows of packed codes are filled up to a multiple of so many bytes.

    Returns:
      None where no loop does this, or `x` is not finite: `quantize` takes any tensor, and says what is wrong with it.
    """
    rows = rowwise(x, scheme)
    found = None if isinstance(rows, str) else rows.quantize_packed(row_multiple)
    if found is None:
        return None
    packed, scale, zero_point, sums = found
    return PackedTensor(packed, scale, zero_point, scheme, tuple(x.shape)), sums
