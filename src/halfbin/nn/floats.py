"""Products in floats: weights whose codes stand for floats, FP8 or tables of 16, by `kernels.float_products`.

`FloatCodes` multiplies a layer's inputs as they are: only the order of the sum, and a rounding of each weight that is left out,
are not the reference's. `RoundedFloats` does the same with inputs that an `InputScheme` has rounded: FP8 on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import float_products, products
from halfbin.kernels.float_products import Kind
from halfbin.nn.matmul import CpuFeatures
from halfbin.nn.packed_weight import PackedWeight, by_row, by_tile, readable
from halfbin.numerics import Format, IntegerFormat, ScaleFormat
from halfbin.numerics.formats import FP8_E4M3, FP8_E5M2
from halfbin.tensor import InputQuantizer, InputScheme, QTensor, Scheme

TABLE_BITS = 4  # of the codes of a table, at most


@dataclass(frozen=True, slots=True, eq=False)
class PackedFloats(PackedWeight):
    """A weight in the layout of `kernels.float_products`."""

    def unpack(self, scheme: Scheme) -> QTensor:
        """The `QTensor` that was packed, bit for bit."""
        codes, scale = float_products.unpack(self.memory)
        return QTensor(codes, by_tile(scale, codes, scheme).to(scheme.scale_format.dtype), None, scheme)


@dataclass(frozen=True, slots=True)
class FloatCodes:
    """Weights whose codes stand for floats; inputs stay what they are."""

    name: str = "float-inputs"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """Codes that are integers, scales not along a row, other devices, no vector instructions."""
        if q.codes.device.type != "cpu":
            return f"its codes are on {q.codes.device}, and these loops run on the CPU"
        if _kind(q.scheme.format) is None:
            return f"its codes are {q.scheme.format.name}, and it reads FP8 and floats of {TABLE_BITS} bits"
        if "avx2" not in cpu.instructions:
            return f"this {cpu.machine} has no AVX2, and its plain loops are slower than torch's float product"
        if 0 in q.shape:
            return f"the weight has no elements: {list(q.shape)}"
        return float_products.refuses(q.scheme.granularity.tile(q.shape)[1], q.shape[1], _stored(q.scale[:0]).dtype)

    def declines(self, x: Tensor) -> str | None:
        """Types that it does not read, and other devices."""
        if x.dtype not in products.INPUT_TYPES:
            return f"inputs are {x.dtype}, and it reads float32 and bfloat16"
        return None if x.is_cpu else f"inputs are on {x.device}"

    def pack(self, q: QTensor) -> PackedFloats:
        """The weight once more: 0.5 bytes for each code of up to 4 bits, 1 for FP8, and its scales."""
        kind, fmt, columns = _kind(q.scheme.format), q.scheme.format, q.shape[1]
        assert kind is not None
        size = min(q.scheme.granularity.tile(q.shape)[1], columns)
        table = fmt.decode(fmt.codes).tolist() if kind is Kind.TABLE else ()
        scale = by_row(_stored(q.scale), q, -(-columns // size))
        return PackedFloats(float_products.pack(q.codes, scale, kind, group_size=size, table=table), q.shape[0])

    def matmul(self, x: Tensor, packed: PackedFloats, bias: Tensor | None) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features]; NaN and infinity spread as in any product."""
        return float_products.linear(x, packed.memory, readable(bias), packed.out_features)


@dataclass(frozen=True, slots=True)
class RoundedFloats:
    """The same weights times inputs that an `InputScheme` rounds: near fake_quantize(x) @ dequantize(w)^T."""

    inputs: InputScheme
    name: str = "rounded-floats"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """As above."""
        return FloatCodes().refuses(q, cpu)

    def pack(self, q: QTensor) -> PackedFloats:
        """The weight once more, as above."""
        return FloatCodes().pack(q)

    def matmul(self, x: Tensor, packed: PackedFloats, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features].

        Raises:
          DataError: NaN or infinity in `x`.
        """
        x_hat = quantizer.fake_quantize(x)
        given = x_hat if x_hat.dtype in products.INPUT_TYPES else x_hat.to(torch.float32)
        return FloatCodes().matmul(given, packed, bias).to(x.dtype)


def _kind(fmt: Format) -> Kind | None:
    """What these products take codes of a format for; None: they read no such codes."""
    if fmt in (FP8_E4M3, FP8_E5M2):
        return Kind.E4M3 if fmt == FP8_E4M3 else Kind.E5M2
    return None if isinstance(fmt, IntegerFormat) or fmt.bits > TABLE_BITS else Kind.TABLE


def _stored(scale: Tensor) -> Tensor:
    """Scales in a type that the kernels read and that holds them exactly: powers of two, down to 2**-127, are bfloat16."""
    return scale.to(torch.bfloat16) if scale.dtype == ScaleFormat.E8M0.dtype else scale
