"""Codes to bytes and back, lossless."""

from __future__ import annotations

from halfbin.packing.bits import pack, pack_words, packed_size, unpack, unpack_words

__all__ = ["pack", "pack_words", "packed_size", "unpack", "unpack_words"]
