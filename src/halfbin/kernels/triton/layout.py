"""A quantized weight as the GPU's kernels read it. Made once, at load, by torch, on the device that holds the codes.

codes    uint8 [rows, bytes]. Integers are stored less the least code of their format, so that all are from 0 to 255.
         Up to 4 bits, two to a byte, 32 columns in 16 bytes: byte 16 c + i holds column 32 c + i in its low half and
         column 32 c + 16 + i in its high one (i < 16); the last 32 columns are filled up with zeros. The halves of
         neighbouring bytes are neighbouring columns: no shuffles. 32 divides every group, so a byte has one scale.
         More bits: one a byte, in order. FP8: the bit patterns.
scale    as it is stored, float [groups, rows]: neighbouring rows of a tile are neighbours in memory.
offset   uint8 [groups, rows]: zero points, less the least code, too; None: the constant -least for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALE_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Weight:
    """See above; `bits` is 4 or 8, `float8` says that codes are bit patterns of e4m3."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: int
    group_size: int
    bits: int
    float8: bool
    constant: int


def refuses(group_size: int, columns: int, scale_type: torch.dtype) -> str | None:
    """Why such a weight cannot be laid out, in words; None: it can."""
    if group_size < columns and group_size % 32:
        return f"groups of {group_size} columns are no multiple of 32"
    if scale_type not in SCALE_TYPES:
        return f"scales are {scale_type}, and Triton's kernels read float32, float16 and bfloat16"
    return None


def pack_integers(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, least: int, group_size: int
) -> Weight:
    """Integer codes of up to 8 bits.

    Args:
      codes: int8 or uint8 [rows, columns], least <= codes < least + 2**bits.
      scale: float32, float16 or bfloat16 [rows, groups], finite.
      zero_point: int32 shaped like scale, in the range of the codes; None for 0.
      bits: of a code.
      least: the least code of the format.
      group_size: columns that share a scale: a multiple of 32, or `columns` and more for one scale a row.
    """
    rows, columns = codes.shape
    _check(codes, scale, group_size)
    stored = codes.contiguous().view(torch.uint8) + -least  # modulo 256, and so for signed codes too
    if bits <= 4:
        pairs = functional.pad(stored, (0, -columns % 32)).view(rows, -1, 2, 16)
        stored = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, -1)
    offset = None if zero_point is None else (zero_point - least).to(torch.uint8).T.contiguous()
    width = 4 if bits <= 4 else 8
    return Weight(stored, scale.T.contiguous(), offset, columns, group_size, width, False, -least)


def pack_float8(codes: Tensor, scale: Tensor, *, group_size: int) -> Weight:
    """Bit patterns of FP8 e4m3, uint8 [rows, columns]; scales and groups as above."""
    _check(codes, scale, group_size)
    return Weight(codes.contiguous(), scale.T.contiguous(), None, codes.shape[1], group_size, 8, True, 0)


def _check(codes: Tensor, scale: Tensor, group_size: int) -> None:
    rows, columns = codes.shape
    if reason := refuses(group_size, columns, scale.dtype):
        raise ValueError(reason)
    groups = -(-columns // min(group_size, columns))
    if tuple(scale.shape) != (rows, groups):
        raise ValueError(f"scale is {list(scale.shape)}, expected {[rows, groups]} for codes {list(codes.shape)}")
