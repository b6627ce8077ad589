"""CRC-32 at memory speed: the values of `zlib.crc32`, by the instructions that processors have for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbin.kernels._native import crc32 as compiled_crc32
from halfbin.kernels.cpu import features

PORTABLE = "portable"
BEST_FIRST = ("pclmul", "neon_crc", PORTABLE)


def usable() -> tuple[str, ...]:
    """The forms that this processor can run, the fastest first; the portable one is always there."""
    return tuple(name for name in BEST_FIRST if name == PORTABLE or name in features())


@functools.cache
def best() -> str:
    """The fastest form that this processor can run."""
    return usable()[0]


def crc32(tensor: Tensor, before: int = 0, *, instruction_set: str | None = None) -> int:
    """CRC-32 of a CPU tensor's bytes in the order of its elements, behind those that gave `before`.

    `instruction_set` names a compiled form; by default the best one.
    """
    if tensor.numel() == 0:
        return before
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return compiled_crc32(instruction_set or best(), data, before)
