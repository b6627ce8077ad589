"""Packing written out lane by lane: the definition of the stream, on any machine and in any byte order.

Eight codes fill `bits` whole bytes, so a row is taken in blocks of eight codes; code i of a block starts at bit i * bits.
`folding.py` gives the same bytes faster and is held against this.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8


def pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Pack whole blocks: uint8 [..., 8 * k], each below 2**bits, to uint8 [..., bits * k]."""
    lanes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, BLOCK)
    packed = torch.zeros(*lanes.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(BLOCK):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= lanes[..., i] << shift  # bits beyond the byte fall off, and go into the next one
        if shift + bits > 8:
            packed[..., byte + 1] |= lanes[..., i] >> (8 - shift)
    return packed.flatten(-2)


def unpack_blocks(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_blocks`: uint8 [..., bits * k] to uint8 [..., 8 * k]."""
    blocks = packed.reshape(*packed.shape[:-1], packed.shape[-1] // bits, bits)
    codes = torch.empty(*blocks.shape[:-1], BLOCK, dtype=torch.uint8, device=packed.device)
    for i in range(BLOCK):
        byte, shift = divmod(i * bits, 8)
        value = blocks[..., byte] >> shift
        if shift + bits > 8:
            value = value | (blocks[..., byte + 1] << (8 - shift))
        codes[..., i] = value & ((1 << bits) - 1)
    return codes.flatten(-2)
