"""The parts of one compressed-tensors weight [out, in], for each of the formats that we write or read.

pack-quantized        weight_packed       int32 [out, ceil(in * bits / 32)]: a dense stream of q - qmin along each row,
(integers)                                lowest bits first, over words of 32 bits; 3-bit codes straddle words
                      weight_scale        float [out, in / group_size]; [out, 1] for one scale a row
                      weight_shape        int64 [2]: out, in
                      weight_zero_point   asymmetric only: int32 [ceil(out * bits / 32), groups]: zero points counted from
                                          qmin, a dense stream down each *column*
int-quantized         weight              int8 [out, in]
naive-quantized       weight_scale        float [out, 1], [1] or [out, in / group_size]
(int8)                weight_zero_point   asymmetric only: int8, shaped like the scale
float-quantized       weight              float8_e4m3fn [out, in]
naive-quantized       weight_scale        float [out, 1], [1] or, in blocks, [ceil(out / rows), ceil(in / columns)]
mxfp8-quantized       likewise, with      weight_scale uint8 [out, in / 32]: e8m0 exponents
mxfp4-pack-quantized  weight_packed       uint8 [out, in / 2]: fp4 bit patterns, the even element in the low nibble
                      weight_scale        uint8 [out, in / 32]: e8m0 exponents
any, static inputs    input_scale         float [1]
                      input_zero_point    asymmetric only: int8 [1]

The dense stream is what compressed-tensors writes since 0.18; 0.17 and before put 32 // bits codes into a word, which
is the same for 2, 4 and 8 bits only. Checked byte for byte against the packers of 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import FormatError, SchemeError
from halfbin.formats.checks import checked_scale, read_as, require_codes, stored_scale, stored_scale_dtype
from halfbin.formats.codes import counted_from_zero, lowest_code
from halfbin.formats.inputs import InputCodec
from halfbin.formats.layout import Parts, Read, Shape, WeightCodec
from halfbin.numerics import IntegerFormat, ScaleFormat
from halfbin.packing.bits import WORD_BYTES, pack, pack_words, unpack, unpack_words
from halfbin.tensor import InputScheme, PackedTensor, PerTensor, QTensor, Scheme, scale_shape


def num_words(num_codes: int, bits: int) -> int:
    """Words of 32 bits that a dense stream takes."""
    return -(-num_codes * bits // 32)


def stored_scale_shape(shape: Shape, scheme: Scheme) -> Shape:
    """The shape of a scale on disk: ours, but for one scale for everything, which is [1] there."""
    return (1,) if isinstance(scheme.granularity, PerTensor) else scale_shape(shape, scheme.granularity)


def module_of(name: str) -> str:
    """The module that owns the weight `name`."""
    if not name.endswith(".weight"):
        raise SchemeError(
            f"compressed-tensors holds the weights of modules, and {name!r} is none: use --format halfbin"
        )
    return name.removesuffix(".weight")


def input_codec(module: str, inputs: InputScheme) -> InputCodec:
    """That of a module whose inputs are quantized."""
    return InputCodec(inputs, f"{module}.", torch.int8)


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """pack-quantized: integers of 2 to 8 bits."""

    def tensors(self, name: str, shape: Shape, scheme: Scheme) -> Parts:
        """Codes, scale, shape and zero point."""
        module, (out, columns), bits = module_of(name), shape, scheme.format.bits
        parts: Parts = {
            f"{module}.weight_packed": (torch.int32, (out, num_words(columns, bits))),
            f"{module}.weight_scale": (scheme.scale_format.dtype, stored_scale_shape(shape, scheme)),
            f"{module}.weight_shape": (torch.int64, (2,)),
        }
        if not scheme.symmetric:
            groups = scale_shape(shape, scheme.granularity)[1]
            parts[f"{module}.weight_zero_point"] = (torch.int32, (num_words(out, bits), groups))
        return parts

    def encode(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """The parts of `q`."""
        words = pack_words(q.codes, q.scheme.format.bits, lowest=lowest_code(q.scheme.format))
        return self._parts(name, words, q)

    row_multiple = WORD_BYTES

    def encode_packed(self, name: str, q: PackedTensor) -> dict[str, Tensor]:
        """The parts of `q`, whose rows are whole words."""
        return self._parts(name, q.packed.view(torch.int32), q)

    def _parts(self, name: str, words: Tensor, q: QTensor | PackedTensor) -> dict[str, Tensor]:
        module, fmt, bits = module_of(name), q.scheme.format, q.scheme.format.bits
        parts = {
            f"{module}.weight_packed": words,
            f"{module}.weight_scale": q.scale.contiguous(),
            **self.fixed(name, q.shape, q.scheme),
        }
        if q.zero_point is not None:
            zeros = q.zero_point.to(fmt.code_dtype).t().contiguous()
            columns = pack_words(zeros, bits, lowest=lowest_code(fmt))
            parts[f"{module}.weight_zero_point"] = columns.t().contiguous()
        return parts

    def fixed(self, name: str, shape: Shape, scheme: Scheme) -> dict[str, Tensor]:
        """The shape."""
        return {f"{module_of(name)}.weight_shape": torch.tensor(shape, dtype=torch.int64)}

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read the parts of `name` back."""
        parts, module, bits = self.tensors(name, shape, scheme), module_of(name), scheme.format.bits
        packed, scale_name, shape_name, zero = (
            f"{module}.weight_{part}" for part in ("packed", "scale", "shape", "zero_point")
        )
        if (stored := read_as(read, shape_name, *parts[shape_name]).tolist()) != list(shape):
            raise FormatError(f"tensor {shape_name!r} says {stored}, expected {list(shape)}; the file is damaged")
        codes = unpack_words(read_as(read, packed, *parts[packed]), bits, shape[1])
        scale = read_as(read, scale_name, *parts[scale_name]).reshape(scale_shape(shape, scheme.granularity))
        scale = checked_scale(scale_name, scale, scheme.scale_format)
        zero_point = None
        if not scheme.symmetric:
            columns = read_as(read, zero, *parts[zero]).t().contiguous()
            zeros = counted_from_zero(unpack_words(columns, bits, shape[0]), scheme.format)
            zero_point = zeros.t().to(torch.int32).contiguous()
        return QTensor(counted_from_zero(codes, scheme.format), scale, zero_point, scheme)


@dataclass(frozen=True, slots=True)
class OneByteCodes:
    """int-quantized, float-quantized, naive-quantized and mxfp8-quantized: a code a byte, under the weight's own name."""

    def tensors(self, name: str, shape: Shape, scheme: Scheme) -> Parts:
        """Codes, scale and zero point."""
        module = module_of(name)
        scales = stored_scale_shape(shape, scheme)
        integers = isinstance(scheme.format, IntegerFormat)
        parts: Parts = {
            name: (torch.int8 if integers else torch.float8_e4m3fn, shape),
            f"{module}.weight_scale": (stored_scale_dtype(scheme.scale_format), scales),
        }
        if not scheme.symmetric:
            parts[f"{module}.weight_zero_point"] = (torch.int8, scales)
        return parts

    def encode(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """The parts of `q`."""
        parts = self.tensors(name, q.shape, q.scheme)
        dtypes = {part: dtype for part, (dtype, _) in parts.items()}
        values = [q.codes.contiguous().view(dtypes[name]), stored_scale(q.scale)]
        if q.zero_point is not None:
            values.append(q.zero_point.to(torch.int8))
        return {part: value.reshape(parts[part][1]) for part, value in zip(parts, values, strict=True)}

    def fixed(self, name: str, shape: Shape, scheme: Scheme) -> dict[str, Tensor]:
        """None."""
        return {}

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read the parts of `name` back."""
        parts = self.tensors(name, shape, scheme)
        stored = read_as(read, name, *parts[name]).contiguous()
        if isinstance(scheme.format, IntegerFormat):
            codes = stored
            _require_range(name, codes, scheme.format)
        else:
            codes = stored.view(torch.uint8)
            require_codes(name, codes, scheme.format)
        scale_name = f"{module_of(name)}.weight_scale"
        scales = scale_shape(shape, scheme.granularity)
        scale = read_as(read, scale_name, *parts[scale_name]).reshape(scales)
        zero_point = None
        if not scheme.symmetric:
            zero = f"{module_of(name)}.weight_zero_point"
            zero_point = read_as(read, zero, *parts[zero]).reshape(scales).to(torch.int32)
            assert isinstance(scheme.format, IntegerFormat)  # no other format has zero points
            _require_range(zero, zero_point, scheme.format)
        return QTensor(codes, checked_scale(scale_name, scale, scheme.scale_format), zero_point, scheme)


@dataclass(frozen=True, slots=True)
class PackedFp4:
    """mxfp4-pack-quantized: two fp4 codes a byte, e8m0 scales."""

    def tensors(self, name: str, shape: Shape, scheme: Scheme) -> Parts:
        """Codes and scale."""
        module, (out, columns) = module_of(name), shape
        return {
            f"{module}.weight_packed": (torch.uint8, (out, columns // 2)),
            f"{module}.weight_scale": (torch.uint8, scale_shape(shape, scheme.granularity)),
        }

    def encode(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """The parts of `q`."""
        module = module_of(name)
        return {f"{module}.weight_packed": pack(q.codes, 4), f"{module}.weight_scale": stored_scale(q.scale)}

    row_multiple = 1

    def encode_packed(self, name: str, q: PackedTensor) -> dict[str, Tensor]:
        """The parts of `q`."""
        return {f"{module_of(name)}.weight_packed": q.packed, f"{module_of(name)}.weight_scale": stored_scale(q.scale)}

    def fixed(self, name: str, shape: Shape, scheme: Scheme) -> dict[str, Tensor]:
        """None."""
        return {}

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read the parts of `name` back; each of the 16 codes is a value."""
        parts = self.tensors(name, shape, scheme)
        packed, scale_name = parts
        codes = unpack(read_as(read, packed, *parts[packed]), 4, shape[1])
        scale = checked_scale(scale_name, read_as(read, scale_name, *parts[scale_name]), scheme.scale_format)
        return QTensor(codes, scale, None, scheme)


def _require_range(name: str, codes: Tensor, fmt: IntegerFormat) -> None:
    if codes.numel() and not fmt.qmin <= int(codes.min()) <= int(codes.max()) <= fmt.qmax:
        raise FormatError(
            f"tensor {name!r} holds codes beyond {fmt.name}'s {fmt.qmin} to {fmt.qmax}; the file is damaged"
        )


PACKED_INTEGERS, ONE_BYTE_CODES, PACKED_FP4 = PackedIntegers(), OneByteCodes(), PackedFp4()

CODECS: dict[str, WeightCodec] = {
    "pack-quantized": PACKED_INTEGERS,
    "int-quantized": ONE_BYTE_CODES,
    "naive-quantized": ONE_BYTE_CODES,
    "float-quantized": ONE_BYTE_CODES,
    "mxfp8-quantized": ONE_BYTE_CODES,
    "mxfp4-pack-quantized": PACKED_FP4,
}


def format_of(scheme: Scheme, inputs: InputScheme | None = None) -> str:
    """The compressed-tensors format that a scheme is written in.

    Integers are packed unless inputs are quantized too: servers multiply those of one byte each, and take packed ones for
    weight-only.
    """
    power_of_two = scheme.scale_format is ScaleFormat.E8M0
    if isinstance(scheme.format, IntegerFormat):
        return "pack-quantized" if inputs is None else "int-quantized"
    if scheme.format.bits == 4:
        return "mxfp4-pack-quantized"
    return "mxfp8-quantized" if power_of_two else "float-quantized"
