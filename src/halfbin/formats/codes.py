"""Codes as they are packed: counted from the format's lowest code, so that none is negative."""

from __future__ import annotations

from torch import Tensor

from halfbin.numerics import Format, IntegerFormat


def lowest_code(fmt: Format) -> int:
    """The code that is stored as 0."""
    return fmt.qmin if isinstance(fmt, IntegerFormat) else 0


def counted_from_zero(stored: Tensor, fmt: Format) -> Tensor:
    """Undo the counting: uint8 codes from `lowest_code` on, changed in place, to codes of `fmt.code_dtype`."""
    return stored.add_(lowest_code(fmt) % 256).view(fmt.code_dtype)  # bytes wrap around: 0 + 248 is -8 as int8
