"""Codes of 1 to 8 bits to bytes and back, without loss and without gaps.

Every row (the last axis) is one dense stream of bits, least significant first: code i lies in bits [i * b, i * b + b) of
the stream, so codes of 3, 5, 6 and 7 bits straddle bytes. The row's last byte is filled up with zeros. With 3 bits:

    byte 0                    byte 1                    byte 2
    c2c2 c1c1c1 c0c0c0        c5 c4c4c4 c3c3c3 c2       c7c7c7 c6c6c6 c5c5

Here: checks, and who moves the bits. On a CPU the compiled loops do (`csrc/packing/`). Elsewhere torch does, in tiles that keep
temporaries small and give each thread its share: in `folding.py`, or `plain.py` on big-endian machines.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.kernels import instruction_sets
from halfbin.kernels._native import pack_rows, unpack_rows
from halfbin.kernels.threads import in_threads
from halfbin.packing import folding, plain

TILE_CODES = 1 << 18  # temporaries of a tile stay in the second-level cache
WORD_BYTES = 4

Tile: TypeAlias = tuple[slice, slice]  # rows and columns

_mover = folding if sys.byteorder == "little" else plain
_instruction_set = instruction_sets.best() if sys.byteorder == "little" else None  # None: torch moves the bits


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes that `num_codes` codes of `bits` bits take."""
    _require_width(bits)
    if num_codes < 0:
        raise SchemeError(f"a row cannot hold {num_codes} codes; expected 0 or more")
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int, *, lowest: int = 0) -> Tensor:
    """Pack codes row by row.

    Args:
      codes: uint8 or int8 [..., n], each in lowest <= code < lowest + 2**bits.
      bits: 1 to 8.
      lowest: the code that is stored as 0: `qmin` of a signed format.

    Returns:
      uint8 [..., packed_size(n, bits)], on the device of `codes`.

    Raises:
      SchemeError: a code needs more bits; names the first one.
    """
    _require_codes(codes, bits)
    return _packed(codes, bits, lowest, packed_size(codes.shape[-1], bits))


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack`.

    Args:
      packed: uint8 [..., packed_size(num_codes, bits)]; what fills up the last byte is not looked at.
      bits: 1 to 8.
      num_codes: codes in a row.

    Returns:
      uint8 [..., num_codes], on the device of `packed`.
    """
    size = packed_size(num_codes, bits)
    _require_stream(packed, torch.uint8, size, f"{num_codes} codes of {bits} bits take {size} bytes a row")
    return _unpacked(packed, bits, num_codes)


def pack_words(codes: Tensor, bits: int, *, lowest: int = 0) -> Tensor:
    """The stream of `pack` in rows of whole little-endian 32-bit words: int32 [..., ceil(n * bits / 32)]."""
    _require_little_endian()
    _require_codes(codes, bits)
    words = _packed_words(codes.shape[-1], bits)
    stream = _packed(codes, bits, lowest, words * WORD_BYTES)
    return stream.view(torch.int32) if words else stream.to(torch.int32)


def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack_words`: int32 [..., ceil(num_codes * bits / 32)] to uint8 [..., num_codes]."""
    _require_little_endian()
    expected = _packed_words(num_codes, bits)
    _require_stream(words, torch.int32, expected, f"{num_codes} codes of {bits} bits take {expected} int32 words a row")
    stream = words.contiguous().view(torch.uint8) if expected else words.to(torch.uint8)
    return _unpacked(stream, bits, num_codes)


def _packed(codes: Tensor, bits: int, lowest: int, size: int) -> Tensor:
    """The stream of each row, filled up with zeros to `size` bytes."""
    rows = _as_rows(codes)
    packed = torch.empty(rows.shape[0], size, dtype=torch.uint8, device=codes.device)
    if _instruction_set is not None and codes.device.type == "cpu":
        whole = rows.contiguous().view(torch.uint8)
        if not pack_rows(_instruction_set, whole, bits, lowest % 256, packed, torch.get_num_threads()):
            raise _too_wide(codes, bits, lowest)
        return packed.view(*codes.shape[:-1], size)
    packed[:, packed_size(rows.shape[1], bits) :] = 0

    def work(share: Sequence[Tile]) -> None:
        for row, column in share:
            first, last = column.start * bits // 8, packed_size(column.stop, bits)
            # Bytes wrap around: -8 is 248, and 248 - 248 is 0.
            tile = rows[row, column].view(torch.uint8) - lowest % 256
            if bits < 8 and tile.numel() and int(tile.max()) >= 1 << bits:
                raise _too_wide(codes, bits, lowest)
            blocks = _mover.pack_blocks(_filled(tile, plain.BLOCK), bits)
            packed[row, first:last] = blocks[:, : last - first]

    in_threads(list(_tiles(rows)), work)
    return packed.view(*codes.shape[:-1], size)


def _too_wide(codes: Tensor, bits: int, lowest: int) -> SchemeError:
    counted = codes.view(torch.uint8) - lowest % 256
    first = tuple(torch.nonzero(counted >= 1 << bits)[0].tolist())
    return SchemeError(
        f"code {int(codes[first])} at {list(first)} does not fit into {bits} bits, {lowest} to {lowest + (1 << bits) - 1}; "
        "state the lowest code, or pack wider"
    )


def _unpacked(stream: Tensor, bits: int, num_codes: int) -> Tensor:
    """The first `num_codes` codes of each row, whatever follows them."""
    rows = _as_rows(stream)
    codes = torch.empty(rows.shape[0], num_codes, dtype=torch.uint8, device=stream.device)
    if _instruction_set is not None and stream.device.type == "cpu":
        unpack_rows(_instruction_set, rows.contiguous(), bits, 0, codes, torch.get_num_threads())
        return codes.view(*stream.shape[:-1], num_codes)

    def work(share: Sequence[Tile]) -> None:
        for row, column in share:
            first, last = column.start * bits // 8, packed_size(column.stop, bits)
            tile = _filled(rows[row, first:last], bits)
            codes[row, column] = _mover.unpack_blocks(tile, bits)[:, : column.stop - column.start]

    in_threads(list(_tiles(codes)), work)
    return codes.view(*stream.shape[:-1], num_codes)


def _tiles(codes: Tensor) -> Iterator[Tile]:
    """Rows and columns of tiles of at most about TILE_CODES codes; columns start at whole blocks, hence at whole bytes."""
    num_rows, num_columns = codes.shape
    width = max(1, min(num_columns, TILE_CODES))
    height = TILE_CODES // width
    for row in range(0, num_rows, height):
        for column in range(0, num_columns, width):
            yield slice(row, min(row + height, num_rows)), slice(column, min(column + width, num_columns))


def _as_rows(tensor: Tensor) -> Tensor:
    """Everything before the last axis in one; also where an axis is empty."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """Rows filled up with zeros to a multiple of `multiple` columns, fit to be viewed as 64-bit words."""
    missing = -rows.shape[1] % multiple
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    # `contiguous` hands back a single row of a wider tensor, and rows from an odd offset, as they are.
    if rows.stride() != (rows.shape[1], 1) or rows.storage_offset() % 8:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def _packed_words(num_codes: int, bits: int) -> int:
    return -(-packed_size(num_codes, bits) // WORD_BYTES)


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SchemeError(f"codes of {bits} bits cannot be packed; expected 1 to 8")


def _require_codes(codes: Tensor, bits: int) -> None:
    _require_width(bits)
    if codes.dtype not in (torch.uint8, torch.int8) or codes.ndim == 0:
        raise SchemeError(f"codes must be uint8 or int8 [..., n] to be packed, got {codes.dtype} {list(codes.shape)}")


def _require_stream(stream: Tensor, dtype: torch.dtype, size: int, expected: str) -> None:
    if stream.dtype != dtype or stream.ndim == 0 or stream.shape[-1] != size:
        raise SchemeError(f"{expected}, got {stream.dtype} {list(stream.shape)}")


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise SchemeError("words are little-endian on disk and this machine is not; use pack and unpack")
