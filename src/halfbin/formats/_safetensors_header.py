"""The header of a safetensors file: which tensors, and where. The layout is drawn in `safetensors.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbin.errors import FormatError

HEADER_BYTES_MAX = 100 * 10**6  # the library's own limit
METADATA_KEY = "__metadata__"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
    """The header's bytes, and where each tensor goes."""
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    offset = 0
    # Wide types first, as the library writes them, so that every tensor starts at a multiple of its element size.
    for name in sorted(tensors, key=lambda n: -tensors[n][0].itemsize):
        dtype, shape = tensors[name]
        size = dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    infos = {
        name: TensorInfo(name, *tensors[name], base + entry["data_offsets"][0], base + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name != METADATA_KEY
    }
    return len(text).to_bytes(8, "little") + text, infos


def parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise FormatError(f"{path}: the header names {twice!r} twice")
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: the header is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: the header must be a JSON object, got {type(entries).__name__}")
    return entries


def entry_of(name: str, entry: object, base: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{where}: unknown dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}")
    shape = _naturals(entry["shape"], f"{where}: shape")
    offsets = _naturals(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets {list(offsets)} are no begin and end")
    needed = dtype.itemsize * math.prod(shape)
    if needed != offsets[1] - offsets[0]:
        raise FormatError(
            f"{where}: {entry['dtype']} {list(shape)} takes {needed} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    if len(shape) > 64 or any(n >= 2**63 for n in shape):
        raise FormatError(f"{where}: shape {list(shape)[:8]} is beyond what a tensor can have")
    return TensorInfo(name, dtype, shape, base + offsets[0], base + offsets[1])


def _naturals(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise FormatError(f"{where} must be a list of integers that are not negative, got {value!r:.80}")
    return tuple(value)


def require_dense(infos: list[TensorInfo], base: int, size: int, path: Path) -> None:
    """Tensors must follow each other without gap or overlap up to the end of the file."""
    at = base
    for info in infos:
        if info.start != at:
            fault = (
                "overlaps the one before" if info.start < at else f"leaves a hole of {info.start - at} bytes before it"
            )
            raise FormatError(f"{path}: tensor {info.name!r} {fault}")
        at = info.end
    if at > size:
        last = next(info for info in infos if info.end > size)
        raise FormatError(
            f"{path}: {at - size} bytes are missing at the end (it has {size} of {at}), tensor {last.name!r} is the first "
            "that is cut; download or copy it again"
        )
    if at < size:
        raise FormatError(f"{path}: {size - at} bytes follow the last tensor, which nothing describes")
