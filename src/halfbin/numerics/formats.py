"""Number formats as data: which real values the codes of up to 8 bits stand for, before any scale.

Three kinds. An integer format is every q with qmin <= q <= qmax. A float format has a sign, an exponent and a mantissa
field. A table format lists its values. Every format encodes by the same three rules:

- the nearest value wins, ties go to the even code (half to even);
- what lies beyond the range saturates at the last finite value, infinities too. The references disagree here: torch 2.13
  saturates e4m3 but lets e5m2 overflow to infinity, ml_dtypes gives NaN and infinity. A weight that overflows should
  lose as little as it can, so ours saturates always;
- NaN becomes the format's NaN where it has one and is refused where it has none.

Codes are int8 or uint8 numbers for integers, uint8 bit patterns for floats, and uint8 indices for tables.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0, table 1 (fp8); OCP Microscaling Formats (MX) 1.0, section 5.3
(fp4 e2m1); Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E (nf4).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError


def working(x: Tensor) -> Tensor:
    """`x` in the type that rounding is computed in: float64 stays, everything narrower becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """Every integer q with qmin <= q <= qmax, evenly spaced: the only kind that takes a zero point."""

    name: str
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        if not (self.qmin <= 0 < self.qmax and self.qmax - self.qmin < 256):
            raise SchemeError(f"codes [{self.qmin}, {self.qmax}] must hold 0, a positive code and at most 256 codes")

    @property
    def bits(self) -> int:
        """Width of a code as it is packed."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """The type that holds codes in memory: int8 for signed formats, uint8 for unsigned ones."""
        return torch.int8 if self.qmin < 0 else torch.uint8

    @property
    def minimum(self) -> float:
        """The lowest value, in steps."""
        return float(self.qmin)

    @property
    def maximum(self) -> float:
        """The highest value, in steps."""
        return float(self.qmax)

    @property
    def codes(self) -> Tensor:
        """Every code, code_dtype [qmax - qmin + 1], in rising order."""
        return torch.arange(self.qmin, self.qmax + 1).to(self.code_dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Float of any shape, in steps, to codes of the same shape."""
        if torch.isnan(x).any():
            raise DataError(f"NaN cannot be a code of {self.name}, which has none for it")
        return working(x).round().clamp_(self.qmin, self.qmax).to(self.code_dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes of any shape to their values, in steps."""
        return codes.to(dtype)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A sign bit, `exponent_bits` and `mantissa_bits`, subnormals included; codes are the bit patterns.

    fp8_e4m3   s eeee mmm    bias 7, S.1111.111 is NaN, no infinity, largest 448
    fp8_e5m2   s eeeee mm    bias 15, exponent 31 is infinity or NaN, largest 57344
    fp4_e2m1   s ee m        bias 1, every code is finite, largest 6
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest_code: int  # magnitude bits of the largest finite value
    nan_code: int | None  # magnitude bits of the NaN we write; None: the format has none

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def code_dtype(self) -> torch.dtype:
        """Bit patterns are held as uint8."""
        return torch.uint8

    @property
    def maximum(self) -> float:
        """The largest finite value."""
        return self._magnitude(self.largest_code)

    @property
    def minimum(self) -> float:
        """The lowest finite value."""
        return -self.maximum

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest finite value; `emax` in the MX specification."""
        return (self.largest_code >> self.mantissa_bits) - self.bias

    @property
    def codes(self) -> Tensor:
        """Every bit pattern, uint8 [2**bits], NaN and infinity included."""
        return torch.arange(2**self.bits, dtype=torch.int32).to(torch.uint8)

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        normal = 2**self.mantissa_bits if exponent else 0
        return float((normal + mantissa) * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits))

    def encode(self, x: Tensor) -> Tensor:
        """Float of any shape to bit patterns of the same shape."""
        x = working(x)
        nan = torch.isnan(x)
        if self.nan_code is None and nan.any():
            raise DataError(f"NaN cannot be a code of {self.name}, which has none for it")
        smallest_exponent = 1 - self.bias
        magnitude = torch.where(nan, 0.0, x.abs()).clamp_(max=self.maximum)
        # frexp gives a mantissa in [0.5, 1), hence the -1; and exponent 0 for a zero, which is no small number to it.
        exponent = torch.where(magnitude > 0, torch.frexp(magnitude).exponent - 1, smallest_exponent)
        exponent = exponent.clamp_(min=smallest_exponent)
        # Power-of-two scaling is exact, so the only rounding is the half-to-even one.
        steps = torch.ldexp(magnitude, self.mantissa_bits - exponent).round_()
        # `steps` carries into the exponent field when it rounds up to the next power of two, as it should.
        code = steps.to(torch.int32) + (exponent - smallest_exponent) * (1 << self.mantissa_bits)
        if self.nan_code is not None:
            code = torch.where(nan, self.nan_code, code)
        return (code + torch.signbit(x).to(torch.int32) * (1 << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bit patterns of any shape to their values."""
        return _look_up(_decode_table(self).to(codes.device, dtype), codes)

    def value_of(self, code: int) -> float:
        """The value of one bit pattern."""
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & (2 ** (self.bits - 1) - 1)
        if magnitude <= self.largest_code:
            return sign * self._magnitude(magnitude)
        infinite = self.name == "fp8_e5m2" and magnitude == self.largest_code + 1
        return sign * float("inf") if infinite else float("nan")


@dataclass(frozen=True, slots=True)
class TableFormat:
    """A list of rising values; a code is an index into it."""

    name: str
    table: tuple[float, ...] = field(repr=False)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.table) - 1).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """Indices are held as uint8."""
        return torch.uint8

    @property
    def minimum(self) -> float:
        """The lowest value."""
        return self.table[0]

    @property
    def maximum(self) -> float:
        """The highest value."""
        return self.table[-1]

    @property
    def codes(self) -> Tensor:
        """Every index, uint8 [number of values]."""
        return torch.arange(len(self.table), dtype=torch.uint8)

    def encode(self, x: Tensor) -> Tensor:
        """Float of any shape to indices of the same shape."""
        if torch.isnan(x).any():
            raise DataError(f"NaN cannot be a code of {self.name}, which has none for it")
        x = working(x).contiguous()
        values = torch.tensor(self.table, dtype=torch.float64)
        midpoints = (values[1:] + values[:-1]) / 2
        # A midpoint may lie between two numbers of x's type: then neither of them is a tie.
        nearest = midpoints.to(x.dtype)
        lower = torch.where(nearest > midpoints, torch.nextafter(nearest, nearest - 1), nearest)
        upper = torch.where(nearest < midpoints, torch.nextafter(nearest, nearest + 1), nearest)
        below = torch.bucketize(x, lower.to(x.device))
        above = torch.bucketize(x, upper.to(x.device), right=True)
        return torch.where(below % 2 == 0, below, above).to(torch.uint8)  # they differ only at ties

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Indices of any shape to their values."""
        return _look_up(torch.tensor(self.table, dtype=dtype, device=codes.device), codes)


Format: TypeAlias = IntegerFormat | FloatFormat | TableFormat


@functools.cache
def _decode_table(fmt: FloatFormat) -> Tensor:
    return torch.tensor([fmt.value_of(code) for code in range(2**fmt.bits)], dtype=torch.float64)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes]; `index_select` takes a quarter of the time of indexing."""
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (
    IntegerFormat(f"int{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)
)
UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (IntegerFormat(f"uint{bits}", 0, 2**bits - 1) for bits in range(2, 9))
TERNARY = IntegerFormat("ternary", -1, 1)
FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, bias=7, largest_code=0x7E, nan_code=0x7F)
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2, bias=15, largest_code=0x7B, nan_code=0x7F)
FP4_E2M1 = FloatFormat("fp4_e2m1", 2, 1, bias=1, largest_code=0x7, nan_code=None)
NF4 = TableFormat(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(INT2, INT3, INT4, INT5, INT6, INT7, INT8),
        *(UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8),
        *(TERNARY, FP8_E4M3, FP8_E5M2, FP4_E2M1, NF4),
    )
}
