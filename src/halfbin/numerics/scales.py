"""How a scale is stored. Codes are always chosen with the scale *after* it was rounded to what the file will hold.

A scale that is stored narrowly is rounded up, not to nearest: a smaller scale would clip the largest weight of its group.
The exception is e8m0 as the MX specification defines it: the exponent is rounded down, so that values up to the next power
of two may clip. What beyond-range scales become is defined: they saturate at the largest and smallest positive value.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.4.1 (e8m0) and 6.3 (its choice).
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor

from halfbin.errors import SchemeError


class ScaleFormat(enum.Enum):
    """The stored type of a scale; the value is its short spelling in a scheme's name."""

    FLOAT32 = "f32"
    FLOAT16 = "f16"
    BFLOAT16 = "bf16"
    E8M0 = "e8m0"  # a power of two, 8 bits, from 2**-127 to 2**127

    @property
    def dtype(self) -> torch.dtype:
        """The torch type that holds such scales in memory and on disk."""
        return _DTYPES[self]

    @property
    def bits(self) -> int:
        """Stored width of one scale."""
        return self.dtype.itemsize * 8

    @classmethod
    def of(cls, dtype: torch.dtype) -> ScaleFormat:
        """The scale format for weights of `dtype`: clients cast scales to the model's own type, so that type is lossless."""
        for scale_format, stored in _DTYPES.items():
            if stored == dtype:
                return scale_format
        raise SchemeError(f"scales cannot be stored as {dtype}; expected one of {[str(d) for d in _DTYPES.values()]}")

    def round(self, scale: Tensor) -> Tensor:
        """Round positive scales (float, any shape) to stored ones: finite and > 0; the same shape, type `dtype`."""
        return _ROUND[self](scale)


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest `dtype` value that is not below `scale`, kept within its positive finite values."""
    info = torch.finfo(dtype)
    # float16 reaches few small scales, so its subnormals count; in float32 and bfloat16 they would only divide badly.
    tiny = info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
    stored = scale.clamp(min=tiny, max=info.max).to(dtype)
    if dtype == torch.float32:
        return stored  # an error of 2**-24 is that of the division itself
    above = torch.nextafter(stored, torch.full_like(stored, info.max))
    return torch.where(stored.to(scale.dtype) < scale.clamp(max=info.max), above, stored)


def _power_of_two(scale: Tensor) -> Tensor:
    """The largest power of two that is not above `scale`, within e8m0's range."""
    exponent = (torch.frexp(scale).exponent - 1).clamp_(-127, 127)
    return torch.ldexp(torch.ones_like(scale), exponent).to(torch.float8_e8m0fnu)


_DTYPES = {
    ScaleFormat.FLOAT32: torch.float32,
    ScaleFormat.FLOAT16: torch.float16,
    ScaleFormat.BFLOAT16: torch.bfloat16,
    ScaleFormat.E8M0: torch.float8_e8m0fnu,
}
_ROUND: dict[ScaleFormat, Callable[[Tensor], Tensor]] = {
    ScaleFormat.FLOAT32: lambda scale: _round_up(scale, torch.float32),
    ScaleFormat.FLOAT16: lambda scale: _round_up(scale, torch.float16),
    ScaleFormat.BFLOAT16: lambda scale: _round_up(scale, torch.bfloat16),
    ScaleFormat.E8M0: _power_of_two,
}
