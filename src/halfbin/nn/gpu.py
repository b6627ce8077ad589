"""Products on GPUs, by `kernels.triton`.

`FloatInputs` multiplies float16 and bfloat16 inputs, as they are, by weights of integers or FP8. `RoundedInputs` multiplies
what an `InputScheme` rounds to INT8 or FP8 by a weight of the same: in integers with the bits of `tensor.int_matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels.triton import layout, machine, quantized_inputs, weight_only
from halfbin.nn.matmul import CpuFeatures
from halfbin.nn.packed_weight import by_row
from halfbin.numerics import IntegerFormat, ScaleFormat
from halfbin.numerics.formats import FP8_E4M3
from halfbin.tensor import InputQuantizer, InputScheme, PerTensor, QTensor, accumulator_bound
from halfbin.tensor.int_matmul import INT32_MAX


@dataclass(frozen=True, slots=True)
class FloatInputs:
    """Weights of integers of up to 8 bits or of FP8 e4m3; inputs stay what they are."""

    name: str = "triton"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """No GPU that Triton's kernels run on, other codes, scales not along a row."""
        if reason := machine.refuses(q.codes.device):
            return reason
        fmt = q.scheme.format
        if not (isinstance(fmt, IntegerFormat) or fmt == FP8_E4M3):
            return f"its codes are {fmt.name}, and Triton's kernels read integers and fp8_e4m3"
        if 0 in q.shape:
            return f"the weight has no elements: {list(q.shape)}"
        return layout.refuses(q.scheme.granularity.tile(q.shape)[1], q.shape[1], _scale(q).dtype)

    def declines(self, x: Tensor) -> str | None:
        """Types that it does not read, and other devices."""
        if x.dtype not in weight_only.INPUT_TYPES:
            return f"inputs are {x.dtype}, and it reads float16 and bfloat16"
        return None if x.is_cuda or machine.interpreted() else f"inputs are on {x.device}"

    def pack(self, q: QTensor) -> layout.Weight:
        """A second copy of the weight: 0.5 bytes for each code of up to 4 bits, 1 for others, and its scales."""
        size = q.scheme.granularity.tile(q.shape)[1]
        scale, fmt = by_row(_scale(q), q), q.scheme.format
        if not isinstance(fmt, IntegerFormat):
            return layout.pack_float8(q.codes, scale, group_size=size)
        zero_point = None if q.zero_point is None else by_row(q.zero_point, q)
        return layout.pack_integers(q.codes, scale, zero_point, bits=fmt.bits, least=fmt.qmin, group_size=size)

    def matmul(self, x: Tensor, packed: layout.Weight, bias: Tensor | None) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features]; a token with NaN or infinity gives NaN."""
        return weight_only.linear(x, packed, bias)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Codes [out_features, in_features] and one scale a row, [out_features]."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class RoundedInputs:
    """Weights of INT8 or FP8 with one scale a row times inputs that are rounded to the same."""

    inputs: InputScheme

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """As above; also zero points, unsigned codes, groups, outliers, and scales stored in ways that it does not know."""
        return self._refuses_codes(q) or self._refuses_scales(q) or self._refuses_device(q)

    def _refuses_codes(self, q: QTensor) -> str | None:
        x, w = self.inputs.scheme, q.scheme
        for side, s in (("inputs", x), ("weights", w)):
            if not (s.format == FP8_E4M3 or (isinstance(s.format, IntegerFormat) and s.format.qmin < 0)):
                return f"{side} are {s.format.name}, and it multiplies signed integers and fp8_e4m3"
            if not s.symmetric:
                return f"{side} have zero points, and it knows none"
        if (x.format == FP8_E4M3) != (w.format == FP8_E4M3):
            return f"inputs are {x.format.name} and weights {w.format.name}, and it multiplies like with like"
        return None

    def _refuses_scales(self, q: QTensor) -> str | None:
        x, columns, size = self.inputs.scheme, q.shape[1], q.scheme.granularity.tile(q.shape)[1]
        if self.inputs.outliers is not None:
            return "outlier columns are multiplied in floats"
        if self.inputs.dynamic and x.scale_format is not ScaleFormat.FLOAT32:
            return f"the scales of dynamic inputs are stored as {x.scale_format.value}, and it finds float32 ones"
        if 0 in q.shape:
            return f"the weight has no elements: {list(q.shape)}"
        if size < columns:
            return f"the weight has a scale for each {size} columns, and it knows one a row"
        formats = x.format, q.scheme.format
        if isinstance(formats[0], IntegerFormat) and isinstance(formats[1], IntegerFormat):
            most = accumulator_bound(columns, formats[0], formats[1])
            return f"sums over {columns} columns could exceed INT32" if most > INT32_MAX else None
        return None

    def _refuses_device(self, q: QTensor) -> str | None:
        refuses = machine.refuses_float8 if q.scheme.format == FP8_E4M3 else machine.refuses
        return refuses(q.codes.device)

    @property
    def _to(self) -> quantized_inputs.Range:
        fmt = self.inputs.scheme.format
        if isinstance(fmt, IntegerFormat):
            return quantized_inputs.Range(fmt.qmin, fmt.qmax)
        return quantized_inputs.Range(float8=True)

    def pack(self, q: QTensor) -> PackedRows:
        """The codes as they are, and a scale for each row."""
        return PackedRows(q.codes.contiguous(), by_row(_scale(q), q)[:, 0].contiguous())

    def matmul(self, x: Tensor, packed: PackedRows, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features].

        Raises:
          DataError: NaN or infinity in `x`.
        """
        scale = quantizer.scale
        if self.inputs.dynamic and isinstance(self.inputs.scheme.granularity, PerTensor) and x.numel():
            scale, _ = self.inputs.scheme.grid.params(*torch.aminmax(x))
            scale = scale.reshape(1)
        if scale is not None:
            scale = scale.to(torch.float32)
        return quantized_inputs.linear(x, packed.codes, packed.scale, bias, self._to, scale)


def _scale(q: QTensor) -> Tensor:
    return q.scale.to(torch.float32) if q.scheme.scale_format is ScaleFormat.E8M0 else q.scale
