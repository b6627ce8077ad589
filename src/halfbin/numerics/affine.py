"""The affine map between real values and codes: x_hat = scale * (value(code) - zero_point).

Everything here works on plain tensors with broadcasting; which elements share a scale is the caller's business.
0.0 is always exact: a range that does not include it is widened until it does, and the zero point is an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics.formats import FloatFormat, Format, IntegerFormat, working
from halfbin.numerics.scales import ScaleFormat


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that elements with one scale can take: a format, with or without a zero point, and the scale's storage."""

    format: Format
    symmetric: bool = True
    scale_format: ScaleFormat = ScaleFormat.FLOAT32

    def __post_init__(self) -> None:
        if not self.symmetric and not isinstance(self.format, IntegerFormat):
            raise SchemeError(f"{self.format.name} has no zero point: asymmetric works with integer formats only")
        if not self.symmetric and self.scale_format is ScaleFormat.E8M0:
            raise SchemeError("a power-of-two scale rounds down and takes no zero point: use f32, f16 or bf16 scales")

    def params(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale as stored, and the zero point, that cover [minimum, maximum] and 0.

        Args:
          minimum: float, any shape: the lowest value to represent.
          maximum: float, the same shape: the highest.

        Returns:
          scale, of the stored type, finite and > 0 (1 where the range is only 0); zero_point int32 or None.

        Symmetric: scale = max|x| / maximum. Asymmetric: scale = (maximum - minimum) / (qmax - qmin), zero point
        rounded half to even. Source: Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 2.1 and 3.
        """
        minimum, maximum = working(minimum).clamp(max=0.0), working(maximum).clamp(min=0.0)
        if self.symmetric:
            scale = self._store(self._symmetric_step(minimum, maximum))
            return scale, None
        fmt = self.format
        assert isinstance(fmt, IntegerFormat)
        # Each end divided by itself: their difference can overflow float32 where the step does not.
        scale = self._store(maximum / self.steps - minimum / self.steps)
        zero_point = (fmt.qmin - minimum / scale.to(minimum.dtype)).round_().clamp_(fmt.qmin, fmt.qmax)
        return scale, zero_point.to(torch.int32)

    @property
    def steps(self) -> float:
        """The steps that a scale divides a range into: of the largest magnitude, or between both ends of an asymmetric grid."""
        if isinstance(self.format, IntegerFormat) and not self.symmetric:
            return float(self.format.qmax - self.format.qmin)
        if self.scale_format is ScaleFormat.E8M0 and isinstance(self.format, FloatFormat):
            # MX section 6.3: 2**(floor(log2(absmax)) - emax); the floor is the scale format's rounding.
            return float(2.0**self.format.largest_exponent)
        return self.format.maximum

    def _symmetric_step(self, minimum: Tensor, maximum: Tensor) -> Tensor:
        if self.format.minimum == 0:  # an unsigned code without zero point holds no negative values
            return maximum / self.steps
        return torch.maximum(-minimum, maximum) / self.steps

    def _store(self, scale: Tensor) -> Tensor:
        return self.scale_format.round(torch.where(scale > 0, scale, 1.0))

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes of `x`; `scale` and `zero_point` broadcast against it. What lies beyond the range is clipped."""
        x = working(x)
        steps = x / scale.to(x.dtype)
        if zero_point is None:
            return self.format.encode(steps)
        fmt = self.format
        assert isinstance(fmt, IntegerFormat)
        if torch.isnan(steps).any():
            raise DataError(f"NaN cannot be a code of {fmt.name}, which has none for it")
        # Rounded before the zero point is added, so that 0.0 and the ties do not depend on it.
        return steps.round_().add_(zero_point).clamp_(fmt.qmin, fmt.qmax).to(fmt.code_dtype)

    def decode(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The values that `codes` stand for, computed in `dtype`."""
        values = self.format.decode(codes, dtype)
        if zero_point is not None:
            values = values - zero_point.to(dtype)
        return values * scale.to(dtype)
