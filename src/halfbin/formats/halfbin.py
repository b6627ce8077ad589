"""The layout "halfbin", versions 1 to 3: safetensors files that hold every scheme without loss.

A quantized tensor X (any name, 1 dimension or more) becomes

    X              uint8 [0]: nothing. It holds the place of X, so that a loader that does not know this layout stops at
                   a shape that does not fit, where it would otherwise fill a missing weight with random numbers
                   (transformers 5 does: it warns of an unknown `quant_method` and goes on)
    X.codes        uint8 [*shape[:-1], ceil(shape[-1] * bits / 8)]: each row of the last axis a dense stream of codes,
                   lowest bits first, padded with zero bits to a whole byte. Integers are counted from qmin; floats are
                   bit patterns; tables are indices
    X.scale        f32, f16, bf16, or the uint8 exponent of e8m0; one dimension for each of X's, ceil(shape / tile)
    X.zero_point   asymmetric schemes only: uint8, zero points counted from qmin, packed as codes are, by rows of X.scale
    X.input_scale       where the inputs of X's layer are quantized with a static scale: [1], stored as X.scale is
    X.input_zero_point  likewise, of asymmetric inputs: int32 [1]
    X.column_ids        where some columns of X, a matrix, stay in floating point: int32 [k], their numbers, rising
    X.columns           likewise: f16, bf16 or f32, those columns [out, k]; [k, out] where X is stored [in, out]. They are the
                        values of X there: what the codes say of them is not looked at, and is written as zero

and config.json says

    "quantization_config": {"quant_method": "halfbin", "version": 1, "tensors": {X: {"scheme": "nf4-g64", "shape": [..]}}}

An entry whose layer's inputs are quantized has "inputs": "int8-token" too, as `parse_inputs` reads it. That is version 2. One
with columns in floating point has "columns": {"count": 3, "dtype": "bfloat16", "axis": 1}, and inputs that leave outliers out
always leave these columns out. That is version 3. The lowest version that says all is written, so that older readers read all
they can, and refuse the rest by its version.

Whatever changes these bytes raises the version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halfbin import __version__
from halfbin.errors import FormatError, SchemeError
from halfbin.formats.checks import (
    checked_scale,
    read_as,
    require_codes,
    require_parts,
    stored_scale,
    stored_scale_dtype,
)
from halfbin.formats.codes import counted_from_zero, lowest_code
from halfbin.formats.columns import ColumnCodec, columns_entry, read_columns
from halfbin.formats.inputs import InputCodec
from halfbin.formats.layout import Infos, Parts, Read, Shape, Stored
from halfbin.numerics import Format
from halfbin.packing.bits import pack, packed_size, unpack
from halfbin.tensor import (
    ColumnSpec,
    InputQuantizer,
    InputScheme,
    PackedTensor,
    QTensor,
    Scheme,
    parse_inputs,
    parse_scheme,
    scale_shape,
)

NEEDED = {"scheme", "shape"}
ENTRY_KEYS = {1: NEEDED, 2: {*NEEDED, "inputs"}, 3: {*NEEDED, "inputs", "columns"}}  # of each version
PLACE_HOLDER = (torch.uint8, (0,))
LARGEST_SIZE = 2**48  # of a dimension: beyond any file, and its products stay cheap
MOST_DIMENSIONS = 16


class HalfbinLayout:
    """Our own layout; see the module's docstring."""

    name = "halfbin"

    def refuses(self, module_class: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> str | None:
        """Why this layout cannot hold such a tensor; None for all that has a dimension and a spelling."""
        if not 0 < len(shape) <= MOST_DIMENSIONS:
            return f"a tensor of shape {list(shape)} has no rows to pack: keep it in 16 bits"
        try:
            scale_shape(shape, scheme.granularity)
            known = parse_scheme(str(scheme)) == scheme and (inputs is None or parse_inputs(str(inputs)) == inputs)
        except SchemeError as error:
            return str(error)
        return None if known else f"{scheme} has no spelling that reads back: use a format by its name"

    def tensors(self, name: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> Parts:
        """Place holder, codes, scale and zero point."""
        scales = scale_shape(shape, scheme.granularity)
        parts: Parts = {
            name: PLACE_HOLDER,
            f"{name}.codes": (torch.uint8, _packed_shape(shape, scheme.format)),
            f"{name}.scale": (stored_scale_dtype(scheme.scale_format), scales),
        }
        if not scheme.symmetric:
            parts[f"{name}.zero_point"] = (torch.uint8, _packed_shape(scales, scheme.format))
        return parts if inputs is None else parts | _input_codec(name, inputs).parts()

    def encode(self, name: str, q: QTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts of `q`."""
        fmt = q.scheme.format
        return self._parts(name, pack(q.codes, fmt.bits, lowest=lowest_code(fmt)), q, inputs)

    def row_multiple(self, scheme: Scheme, inputs: InputScheme | None = None) -> int | None:
        """Rows end with the byte of their last code."""
        return 1

    def encode_packed(self, name: str, q: PackedTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts of `q`."""
        return self._parts(name, q.packed, q, inputs)

    def _parts(
        self, name: str, codes: Tensor, q: QTensor | PackedTensor, inputs: InputQuantizer | None
    ) -> dict[str, Tensor]:
        fmt = q.scheme.format
        parts = {
            **self.fixed(name, q.shape, q.scheme, inputs),
            f"{name}.codes": codes,
            f"{name}.scale": stored_scale(q.scale),
        }
        if q.zero_point is not None:
            parts[f"{name}.zero_point"] = pack(q.zero_point.to(fmt.code_dtype), fmt.bits, lowest=lowest_code(fmt))
        return parts

    def fixed(self, name: str, shape: Shape, scheme: Scheme, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The place holder, and the scale of static inputs."""
        place = {name: torch.empty(0, dtype=torch.uint8)}
        return place if inputs is None else place | _input_codec(name, inputs.inputs).encode(inputs)

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read the parts of `name` back."""
        parts = self.tensors(name, shape, scheme)
        codes = _unpacked(f"{name}.codes", shape, scheme.format, parts, read)
        scale_name = f"{name}.scale"
        scale = checked_scale(scale_name, read_as(read, scale_name, *parts[scale_name]), scheme.scale_format)
        zero_point = None
        if not scheme.symmetric:
            zero_point = _unpacked(f"{name}.zero_point", tuple(scale.shape), scheme.format, parts, read).to(torch.int32)
        return QTensor(codes, scale, zero_point, scheme)

    def config(
        self,
        tensors: Mapping[str, tuple[Scheme, Shape]],
        ignored: Sequence[str],
        inputs: Mapping[str, InputScheme] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """The `quantization_config`: every quantized tensor with its scheme, its shape and its layer's inputs."""
        entries: dict[str, dict[str, object]] = {
            name: {"scheme": str(scheme), "shape": [int(n) for n in shape]} for name, (scheme, shape) in tensors.items()
        }
        for name, how in (inputs or {}).items():
            entries[name]["inputs"] = str(how)
        return {"quant_method": self.name, "version": 2 if inputs else 1, "tensors": entries}

    def column_codec(self, name: str, shape: Shape, spec: ColumnSpec) -> ColumnCodec:
        """Two parts more."""
        return ColumnCodec(name, shape, spec)

    def with_columns(self, config: Mapping[str, object], columns: Mapping[str, ColumnSpec]) -> dict[str, object]:
        """The configuration as version 3, with the columns of each tensor that has some."""
        entries = config["tensors"]
        assert isinstance(entries, dict)
        added = {name: {**entries[name], "columns": columns_entry(spec)} for name, spec in columns.items()}
        return {**config, "version": 3, "tensors": {**entries, **added}}

    def schemes(self, config: Mapping[str, object], infos: Infos, read: Read) -> dict[str, Stored]:
        """The tensors that the configuration lists; each must be there in full, and none may be there unlisted."""
        entries, keys = _entries(config)
        found = {}
        for name, entry in entries.items():
            scheme, shape, inputs = _entry(name, entry, keys)
            if reason := self.refuses("", shape, scheme):
                raise FormatError(f"tensor {name!r} in config.json: {reason}")
            require_parts(infos, self.tensors(name, shape, scheme, inputs))
            if scheme.symmetric and f"{name}.zero_point" in infos:
                raise FormatError(f"tensor {name + '.zero_point'!r} is there, but {scheme} has no zero point")
            found[name] = Stored(
                scheme,
                shape,
                self,
                inputs=None if inputs is None else _input_codec(name, inputs),
                columns=_stored_columns(name, entry, shape, infos),
            )
        _require_listed(infos, entries)
        return found


def _input_codec(name: str, inputs: InputScheme) -> InputCodec:
    return InputCodec(inputs, f"{name}.", torch.int32)


def _packed_shape(shape: Shape, fmt: Format) -> Shape:
    return (*shape[:-1], packed_size(shape[-1], fmt.bits))


def _unpacked(name: str, shape: Shape, fmt: Format, parts: Parts, read: Read) -> Tensor:
    """Codes of `code_dtype` and `shape`, checked to be codes of the format."""
    packed = read_as(read, name, *parts[name])
    used = shape[-1] * fmt.bits % 8
    if used and packed.numel() and bool((packed[..., -1] >> used).any()):
        raise FormatError(f"tensor {name!r}: the bits after a row's last code are not zero; the file is damaged")
    codes = unpack(packed, fmt.bits, shape[-1])
    require_codes(name, codes, fmt)
    return counted_from_zero(codes, fmt)


def _stored_columns(name: str, entry: object, shape: Shape, infos: Infos) -> ColumnCodec | None:
    """The codec of the columns that an entry speaks of; all of it must be there, and nothing that it does not speak of."""
    if isinstance(entry, dict) and "columns" in entry:
        codec = read_columns(name, entry["columns"], shape)
        require_parts(infos, codec.parts())
        return codec
    if f"{name}.column_ids" in infos:
        raise FormatError(f"tensor {name + '.column_ids'!r} is there, but config.json speaks of no columns of {name!r}")
    return None


def _entries(config: Mapping[str, object]) -> tuple[dict[str, object], set[str]]:
    """The table of tensors, and the keys that an entry may have in this version."""
    version = config.get("version")
    if type(version) is not int or version not in ENTRY_KEYS:
        raise FormatError(
            f"config.json has version {version!r:.80} of the halfbin layout, and halfbin {__version__} reads versions "
            f"1 to {max(ENTRY_KEYS)}: install a newer halfbin, or quantize the original model again"
        )
    entries = config.get("tensors")
    if not isinstance(entries, dict):
        raise FormatError("config.json: quantization_config.tensors must map tensor names to scheme and shape")
    return entries, ENTRY_KEYS[version]


def _entry(name: str, entry: object, keys: set[str]) -> tuple[Scheme, Shape, InputScheme | None]:
    if not isinstance(entry, dict) or not NEEDED <= set(entry) <= keys or not _are_text(entry):
        raise FormatError(
            f"config.json: the entry of tensor {name!r} must hold a scheme and a shape, got {_short(entry)}"
        )
    shape = entry["shape"]
    if not isinstance(shape, list) or not 0 < len(shape) <= MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise FormatError(f"config.json: the shape of tensor {name!r} must be a list of sizes, got {_short(shape)}")
    if math.prod(shape) > LARGEST_SIZE:
        raise FormatError(f"config.json: tensor {name!r} claims {math.prod(shape)} elements, more than any file holds")
    try:
        inputs = parse_inputs(entry["inputs"]) if "inputs" in entry else None
        return parse_scheme(entry["scheme"]), tuple(shape), inputs
    except SchemeError as error:
        raise FormatError(
            f"config.json: the scheme of tensor {name!r} is not understood ({error}); "
            f"it may come from a newer halfbin than {__version__}"
        ) from error


def _are_text(entry: Mapping[str, object]) -> bool:
    return all(isinstance(entry[key], str) for key in ("scheme", "inputs") if key in entry)


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n <= LARGEST_SIZE


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _require_listed(infos: Infos, entries: Mapping[str, object]) -> None:
    for name, info in infos.items():
        held = info.dtype == torch.uint8 and tuple(info.shape) == (0,)
        if held and name not in entries and f"{name}.codes" in infos:
            raise FormatError(f"tensor {name!r} is stored as codes, but config.json does not say what they mean")


HALFBIN = HalfbinLayout()
