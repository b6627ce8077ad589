"""The header of a safetensors file: which tensors, and where. The layout is drawn in `safetensors.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbin.errors import FormatError, OutputError
from halfbin.formats._json import parse_json, require_unicode

HEADER_BYTES_MAX = 100 * 10**6  # the library's own limit
METADATA_KEY = "__metadata__"
DIMS_MAX = 64  # torch describes more, nothing computes with them
INT64_MAX = 2**63 - 1  # torch counts sizes, strides and bytes in these
FLOAT4_PAIR = torch.float4_e2m1fn_x2  # one element holds two numbers, so the file's last dimension is twice torch's

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": FLOAT4_PAIR,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: what it is and where its bytes lie, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def layout(tensors: Specs, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's bytes, and where each tensor goes.

    Raises:
      OutputError: a name, dtype, shape or text that the format cannot hold.
    """
    entries: dict[str, Any] = {METADATA_KEY: _texts(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        _require_writable(name, dtype, shape)
    # Wide types first, as the library writes them, so that every tensor starts at a multiple of its element size.
    for name in sorted(tensors, key=lambda n: -tensors[n][0].itemsize):
        dtype, shape = tensors[name]
        size = dtype.itemsize * math.prod(shape)
        stored = [*shape[:-1], 2 * shape[-1]] if dtype == FLOAT4_PAIR else list(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": stored, "data_offsets": [offset, offset + size]}
        offset += size
    text = _header_text(entries)
    base = 8 + len(text)
    infos = {
        name: TensorInfo(name, *tensors[name], base + entry["data_offsets"][0], base + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name != METADATA_KEY
    }
    return len(text).to_bytes(8, "little") + text, infos


def parse(text: bytes, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a header says: tensors in the order of their data, and the metadata.

    Args:
      text: the header without its leading length.
      size: bytes of the whole file.
      path: for messages.

    Raises:
      FormatError: anything that does not hold together, or does not fit the file's size.
    """
    where = f"{path}: the header"
    entries = parse_json(text, where)
    if not isinstance(entries, dict):
        raise FormatError(f"{where} must be a JSON object, got {type(entries).__name__}")
    if not text.startswith(b"{"):
        raise FormatError(f"{where} must begin with a brace, got {text[:8]!r}")
    metadata = _metadata(entries.pop(METADATA_KEY, {}), where)
    base = 8 + len(text)
    infos = [_entry(name, entry, base, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _require_dense(infos, base, size, path)
    return {info.name: info for info in infos}, metadata


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise OutputError(
                f"metadata {key!r:.80} is {type(value).__name__}; safetensors holds texts only, use str()"
            )
    return dict(metadata)


def _require_writable(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if name == METADATA_KEY:
        raise OutputError(f"no tensor can be named {METADATA_KEY}: safetensors keeps that name for its metadata")
    if dtype not in NAMES:
        raise OutputError(f"tensor {name!r}: safetensors has no {dtype}; cast to one of {', '.join(NAMES.values())}")
    if len(shape) > DIMS_MAX or not all(type(n) is int and n >= 0 for n in shape):
        raise OutputError(f"tensor {name!r}: shape {list(shape)[:8]} must be at most {DIMS_MAX} sizes of 0 or more")
    if dtype == FLOAT4_PAIR and not shape:
        raise OutputError(f"tensor {name!r}: a pair of 4-bit floats needs a last dimension, got a scalar")


def _header_text(entries: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"a tensor's name or the metadata is no Unicode text: {error.reason}") from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise OutputError(
            f"the header takes {len(text)} bytes, readers allow {HEADER_BYTES_MAX}; use more, smaller files"
        )
    return text


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {METADATA_KEY} must hold texts by name, got {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FormatError(f"{where}: {METADATA_KEY} must hold texts, {key!r:.80} is {type(text).__name__}")
        require_unicode(text, where)
    return value


def _entry(name: str, entry: object, base: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{where}: unknown dtype {entry['dtype']!r:.80}; expected one of {', '.join(DTYPES)}")
    shape = _shape(entry["shape"], dtype, where)
    begin, end = _offsets(entry["data_offsets"], where)
    needed = dtype.itemsize * math.prod(shape)
    if needed != end - begin:
        raise FormatError(
            f"{where}: {entry['dtype']} {entry['shape']} takes {needed} bytes, data_offsets give {end - begin}"
        )
    return TensorInfo(name, dtype, shape, base + begin, base + end)


def _shape(value: object, dtype: torch.dtype, where: str) -> tuple[int, ...]:
    """The shape of torch's tensor; refuses what torch could not even describe, such as [0, 2**62, 2**62]."""
    shape = _naturals(value, f"{where}: shape")
    if len(shape) > DIMS_MAX:
        raise FormatError(f"{where}: {len(shape)} dimensions are too many; expected at most {DIMS_MAX}")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > INT64_MAX:
        raise FormatError(f"{where}: shape {list(shape)[:8]} is beyond 64 bits")
    if dtype != FLOAT4_PAIR:
        return shape
    if not shape or shape[-1] % 2:
        raise FormatError(f"{where}: 4-bit floats lie in pairs, the last dimension of {list(shape)} must be even")
    return (*shape[:-1], shape[-1] // 2)


def _offsets(value: object, where: str) -> tuple[int, int]:
    offsets = _naturals(value, f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets {list(offsets)[:8]} are no begin and end")
    return offsets[0], offsets[1]


def _naturals(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= INT64_MAX for n in value):
        raise FormatError(f"{where} must be a list of integers from 0 to 2**63 - 1, got {value!r:.80}")
    return tuple(value)


def _require_dense(infos: list[TensorInfo], base: int, size: int, path: Path) -> None:
    """Tensors must follow each other without gap or overlap up to the end of the file."""
    at = base
    for info in infos:
        if info.start != at:
            gap = info.start - at
            fault = "overlaps the one before" if gap < 0 else f"leaves a hole of {gap} bytes before it"
            raise FormatError(f"{path}: tensor {info.name!r:.200} {fault}")
        at = info.end
    if at > size:
        cut = next(info for info in infos if info.end > size)
        raise FormatError(
            f"{path}: {at - size} bytes are missing at the end (it has {size} of {at}), tensor {cut.name!r:.200} is the "
            "first that is cut; download or copy it again"
        )
    if at < size:
        raise FormatError(f"{path}: {size - at} bytes follow the last tensor, which nothing describes")
