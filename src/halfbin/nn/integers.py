"""Products in integers: weights of up to 8 bits times inputs of 8 bits, by `kernels.products`.

The values of fp4 are integers, too: halves of them.

`IntegerInputs` stands in for a float product. The layer's inputs stay what they are on paper, and are rounded to INT8 on the
fly, one scale for each token and group of columns: an approximation of x @ w_hat^T, whose added error docs/kernels.md states.
For rows with one scale the groups are of 128 columns, too, so that an outlier among the inputs spoils the steps of its own
neighbours only.

`ExactIntegers` multiplies what is INT8 on both sides already, and gives the bits of `tensor.int_matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import products
from halfbin.kernels.products import INPUT_TYPES
from halfbin.nn.matmul import CpuFeatures
from halfbin.nn.packed_weight import PackedWeight, by_row, by_tile, readable
from halfbin.numerics import Format, IntegerFormat, ScaleFormat
from halfbin.numerics.formats import FP4_E2M1
from halfbin.tensor import InputQuantizer, InputScheme, PerTensor, QTensor, Scheme, require_finite

BY_GROUP = products.InputGrid()
INPUT_GROUP = 128  # columns that share an input scale where a weight row has one scale


@dataclass(frozen=True, slots=True, eq=False)
class PackedIntegers(PackedWeight):
    """A weight in the layout of `kernels.products`."""

    def unpack(self, scheme: Scheme) -> QTensor:
        """The `QTensor` that was packed, bit for bit."""
        held = _integers(scheme.format)
        assert held is not None
        codes, scale, zero_point = products.unpack(self.memory, least=held.least)
        zero_point = None if zero_point is None else by_tile(zero_point, codes, scheme)
        scale = by_tile(scale, codes, scheme)
        scale = scale if scale.dtype == scheme.scale_format.dtype else scale.to(torch.float32) / held.step
        return QTensor(codes, scale.to(scheme.scale_format.dtype), zero_point, scheme)


@dataclass(frozen=True, slots=True)
class IntegerInputs:
    """Weights of integer codes; inputs rounded to INT8 per token and group."""

    name: str = "int8-inputs"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """Codes that are no integers, scales not along a row, other devices, no vector instructions."""
        size = q.scheme.granularity.tile(q.shape)[1]
        return refuses_weight(q, size if size < q.shape[1] else INPUT_GROUP, cpu)

    def pack(self, q: QTensor) -> PackedIntegers:
        """The weight once more: 0.5 bytes for each code of up to 4 bits, 1 for others, and its scales."""
        size = q.scheme.granularity.tile(q.shape)[1]
        return pack(q, size if size < q.shape[1] else INPUT_GROUP, sums=False)

    def declines(self, x: Tensor) -> str | None:
        """Types that it does not read, and other devices."""
        if x.dtype in INPUT_TYPES and x.is_cpu:
            return None
        return f"inputs are {x.dtype} on {x.device}, and it reads float32 and bfloat16 on the CPU"

    def matmul(self, x: Tensor, packed: PackedIntegers, bias: Tensor | None) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features]; a token with NaN or infinity gives NaN."""
        bias = None if bias is None else readable(bias)  # the call itself is a part of what a small product takes
        return products.linear(x, packed.memory, bias, packed.out_features, BY_GROUP)


@dataclass(frozen=True, slots=True)
class ExactIntegers:
    """Integer weights times inputs that an `InputScheme` rounds: the same bits as `int_matmul`."""

    inputs: InputScheme

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """As above; also inputs whose scales are found and stored in ways that the kernel does not know."""
        scheme = self.inputs.scheme
        if not isinstance(scheme.format, IntegerFormat):
            return f"inputs are {scheme.format.name}, no integers"
        if self.inputs.dynamic and scheme.scale_format is not ScaleFormat.FLOAT32:
            return f"the scales of dynamic inputs are stored as {scheme.scale_format.value}, and it finds float32 ones"
        return refuses_weight(q, q.scheme.granularity.tile(q.shape)[1], cpu)

    @property
    def grid(self) -> products.InputGrid:
        """What the kernel rounds inputs to."""
        fmt = self.inputs.scheme.format
        assert isinstance(fmt, IntegerFormat)
        return products.InputGrid(by_group=False, symmetric=self.inputs.scheme.symmetric, qmin=fmt.qmin, qmax=fmt.qmax)

    def pack(self, q: QTensor) -> PackedIntegers:
        """The weight once more, as above."""
        return pack(q, q.scheme.granularity.tile(q.shape)[1], sums=self.grid.needs_sums)

    def matmul(self, x: Tensor, packed: PackedIntegers, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features].

        Raises:
          DataError: NaN or infinity in `x`.
        """
        scale, zero_point = quantizer.scale, quantizer.zero_point
        if self.inputs.dynamic and isinstance(self.inputs.scheme.granularity, PerTensor) and x.numel():
            require_finite(x)
            least, greatest = torch.aminmax(x)
            scale, zero_point = self.inputs.scheme.grid.params(least, greatest)
        if scale is not None and scale.dtype != torch.float32:
            scale = scale.to(torch.float32)
        given = x if x.dtype in INPUT_TYPES else x.to(torch.float32)
        bias = readable(bias)
        y = products.linear(given, packed.memory, bias, packed.out_features, self.grid, scale, zero_point)
        return y.to(x.dtype)


def refuses_weight(q: QTensor, size: int, cpu: CpuFeatures) -> str | None:
    """Why a weight whose input scales change every `size` columns cannot be packed; None: it can."""
    if q.codes.device.type != "cpu":
        return f"its codes are on {q.codes.device}, and these loops run on the CPU"
    held = _integers(q.scheme.format)
    if held is None:
        return f"its codes are {q.scheme.format.name}, no integers"
    if "avx2" not in cpu.instructions:
        return f"this {cpu.machine} has no AVX2, and its plain loops are slower than torch's float product"
    if 0 in q.shape:
        return f"the weight has no elements: {list(q.shape)}"
    return products.refuses(held.bits, size, q.shape[1], _stored_scale(q.scale[:0], held.step).dtype)


@dataclass(frozen=True, slots=True)
class _Integers:
    """Codes as integers: `table` of them, or the codes themselves, that many steps of `step` each."""

    bits: int
    least: int
    table: tuple[int, ...] | None = None
    step: float = 1.0


def _integers(fmt: Format) -> _Integers | None:
    """How a format's codes are integers; None: they are none. Twice fp4's values are: 0, 1, 2, 3, 4, 6, 8, 12 and negatives."""
    if isinstance(fmt, IntegerFormat):
        return _Integers(fmt.bits, fmt.qmin)
    if fmt == FP4_E2M1:
        doubled = 2 * fmt.decode(torch.arange(16, dtype=fmt.code_dtype))
        return _Integers(4, 0, tuple(int(value) for value in doubled), 0.5)
    return None


def _stored_scale(scale: Tensor, step: float) -> Tensor:
    """Scales times `step`, in a type that the kernels read and that holds them exactly."""
    if scale.dtype == ScaleFormat.E8M0.dtype:
        return scale.to(torch.float32).mul_(step).to(torch.bfloat16)  # powers of two, down to subnormal ones
    return scale if step == 1 else scale.to(torch.float32) * step


def pack(q: QTensor, size: int, *, sums: bool) -> PackedIntegers:
    """A weight [out_features, in_features] for inputs whose scales change every `size` columns, or once a row."""
    held = _integers(q.scheme.format)
    assert held is not None
    rows, columns = q.shape
    groups = -(-columns // size)
    zero_point = None if q.zero_point is None else by_row(q.zero_point, q, groups)
    scale = by_row(_stored_scale(q.scale, held.step), q, groups)
    memory = products.pack(
        q.codes, scale, zero_point, bits=held.bits, least=held.least, group_size=size, sums=sums, table=held.table
    )
    return PackedIntegers(memory, rows)
