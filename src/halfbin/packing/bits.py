"""Codes of 1 to 8 bits to bytes and back, without loss and without gaps.

Every row (the last axis) is one dense stream of bits, least significant first: code i lies in bits [i * b, i * b + b) of
the stream, so codes of 3, 5, 6 and 7 bits straddle bytes. The row's last byte is filled up with zeros. With 3 bits:

    byte 0                    byte 1                    byte 2
    c2c2 c1c1c1 c0c0c0        c5 c4c4c4 c3c3c3 c2       c7c7c7 c6c6c6 c5c5

Eight codes fill `bits` whole bytes, whatever the width, so rows are handled in blocks of eight codes.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from halfbin.errors import SchemeError

CHUNK_CODES = 1 << 18  # temporaries of a chunk stay in the second-level cache


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes that `num_codes` codes of `bits` bits take."""
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
      codes: uint8 [..., n], each below 2**bits.
      bits: 1 to 8.

    Returns:
      uint8 [..., packed_size(n, bits)].

    Raises:
      SchemeError: a code needs more bits; names the first one.
    """
    _require_width(bits)
    if codes.dtype != torch.uint8:
        raise SchemeError(f"codes must be uint8 to be packed, got {codes.dtype}")
    rows = _as_rows(codes)
    _require_narrow(rows, bits)
    size = packed_size(rows.shape[1], bits)
    packed = torch.empty(rows.shape[0], size, dtype=torch.uint8)
    for start, stop in _chunks(rows):
        packed[start:stop] = _pack_rows(rows[start:stop], bits)[:, :size]
    return packed.reshape(*codes.shape[:-1], size)


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack`.

    Args:
      packed: uint8 [..., packed_size(num_codes, bits)].
      bits: 1 to 8.
      num_codes: codes in a row.

    Returns:
      uint8 [..., num_codes].
    """
    _require_width(bits)
    size = packed_size(num_codes, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise SchemeError(
            f"{num_codes} codes of {bits} bits take {size} bytes a row, got {packed.dtype} {list(packed.shape)}"
        )
    rows = _as_rows(packed)
    codes = torch.empty(rows.shape[0], num_codes, dtype=torch.uint8)
    for start, stop in _chunks(codes):
        codes[start:stop] = _unpack_rows(rows[start:stop], bits)[:, :num_codes]
    return codes.reshape(*packed.shape[:-1], num_codes)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The same stream in rows of whole little-endian 32-bit words: int32 [..., ceil(n * bits / 32)]."""
    _require_little_endian()
    packed = pack(codes, bits)
    words = packed_size(codes.shape[-1], bits) + 3 >> 2
    if not packed.numel():
        return torch.empty(*codes.shape[:-1], words, dtype=torch.int32)
    if packed.shape[-1] != words * 4:
        packed = torch.nn.functional.pad(packed, (0, words * 4 - packed.shape[-1]))
    return packed.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack_words`: int32 [..., ceil(num_codes * bits / 32)] to uint8 [..., num_codes]."""
    _require_little_endian()
    expected = packed_size(num_codes, bits) + 3 >> 2
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        raise SchemeError(
            f"{num_codes} codes of {bits} bits take {expected} int32 words a row, got {words.dtype} {list(words.shape)}"
        )
    if not words.numel():
        return torch.empty(*words.shape[:-1], num_codes, dtype=torch.uint8)
    stream = words.contiguous().view(torch.uint8)[..., : packed_size(num_codes, bits)]
    return unpack(stream, bits, num_codes)


def _pack_rows(rows: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] to uint8 [rows, at least packed_size]."""
    if bits == 8:
        return rows
    if 8 % bits == 0:
        per_byte = 8 // bits
        lanes = _filled(rows, per_byte).view(rows.shape[0], -1, per_byte)
        packed = lanes[:, :, 0].clone()
        for i in range(1, per_byte):
            packed |= lanes[:, :, i] << (i * bits)
        return packed
    lanes = _filled(rows, 8).view(rows.shape[0], -1, 8)
    out = torch.zeros(rows.shape[0], lanes.shape[1], bits, dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, :, byte] |= lanes[:, :, i] << shift  # bits beyond the byte fall off, and go into the next one
        if shift + bits > 8:
            out[:, :, byte + 1] |= lanes[:, :, i] >> (8 - shift)
    return out.view(rows.shape[0], -1)


def _unpack_rows(rows: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] to uint8 [rows, at least the codes in them]."""
    if bits == 8:
        return rows
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        per_byte = 8 // bits
        codes = torch.empty(*rows.shape, per_byte, dtype=torch.uint8)
        for i in range(per_byte):
            codes[:, :, i] = (rows >> (i * bits)) & mask
        return codes.view(rows.shape[0], -1)
    blocks = _filled(rows, bits).view(rows.shape[0], -1, bits)
    codes = torch.empty(rows.shape[0], blocks.shape[1], 8, dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = blocks[:, :, byte] >> shift
        if shift + bits > 8:
            value = value | (blocks[:, :, byte + 1] << (8 - shift))
        codes[:, :, i] = value & mask
    return codes.view(rows.shape[0], -1)


def _as_rows(tensor: Tensor) -> Tensor:
    """Everything before the last axis in one; also where an axis is empty."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """Rows filled up with zeros to a multiple of `multiple` columns."""
    missing = -rows.shape[1] % multiple
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    """Row ranges of about CHUNK_CODES codes."""
    step = max(1, CHUNK_CODES // max(rows.shape[1], 1))
    return [(start, min(start + step, rows.shape[0])) for start in range(0, rows.shape[0], step)]


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise SchemeError(f"codes of {bits} bits cannot be packed; expected 1 to 8")


def _require_narrow(rows: Tensor, bits: int) -> None:
    if bits == 8 or rows.numel() == 0 or int(rows.max()) < 1 << bits:
        return
    row, column = (int(i) for i in torch.nonzero(rows >= 1 << bits)[0])
    raise SchemeError(f"code {int(rows[row, column])} at [{row}, {column}] does not fit into {bits} bits")


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise SchemeError("words are little-endian on disk and this machine is not; use pack and unpack")
