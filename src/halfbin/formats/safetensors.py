"""The safetensors container: a strict reader, and a writer that takes tensors one at a time.

    bytes 0..7      length n of the header, unsigned, little-endian
    bytes 8..8+n    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                    "__metadata__": {"key": "text"}}, filled up with spaces to a multiple of 8
    then            the tensors, without gaps or overlaps; offsets count from here

Spec: https://github.com/huggingface/safetensors. The library of that name wants all tensors of a file at once when it
writes and maps files into memory when it reads; models larger than memory need neither, hence this module. Its reader also
accepts duplicate names, ours refuses them. A stranger's file can only ever raise `FormatError`: every length and offset is
checked, in Python's unbounded integers, before anything is allocated.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import FormatError, OutputError

HEADER_BYTES_MAX = 100 * 10**6  # the library's own limit
METADATA_KEY = "__metadata__"
READ_BYTES = 1 << 30  # one read call moves at most about 2 GiB on Linux

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


class SafetensorsFile:
    """An open file whose header has been checked. `tensors` keeps the order of the data."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`.

        Raises:
          FormatError: the file cannot be opened, or is not what it claims to be.
        """
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise FormatError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            tensors, metadata = _read_header(self._handle, path)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.metadata: Mapping[str, str] = metadata

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        info = self._info(name)
        return self._read(info, info.shape, info.start)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop of the first dimension, in memory of their own."""
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise FormatError(f"{self.path}: tensor {name!r} of shape {list(info.shape)} has no rows {start} to {stop}")
        row_bytes = info.num_bytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, (stop - start, *info.shape[1:]), info.start + start * row_bytes)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: there is no tensor {name!r}")
        return self.tensors[name]

    def _read(self, info: TensorInfo, shape: tuple[int, ...], offset: int) -> Tensor:
        # Sizes were checked against the file's length when it was opened, so this allocates no more than that.
        tensor = torch.empty(shape, dtype=info.dtype)
        rest = _bytes_of(tensor)
        while rest:
            count = os.preadv(self._handle, [rest[:READ_BYTES]], offset)
            if count == 0:
                raise FormatError(f"{self.path}: tensor {info.name!r} ends early; the file was cut while it was open")
            offset += count
            rest = rest[count:]
        return tensor


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand and arrive one at a time, in any order.

    The bytes go to `path` + ".partial", which takes its name when everything is there and on the disk. As a context
    manager: commits at the end of the block, removes the partial file after an exception.
    """

    def __init__(self, path: Path, tensors: Specs, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and reserve the disk space.

        Raises:
          OutputError: the disk is too full, or the file cannot be made.
        """
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        header, self._infos = _layout(tensors, metadata)
        self._missing = dict.fromkeys(tensors)
        self._handle = -1
        size = max((info.end for info in self._infos.values()), default=len(header))
        try:
            self._handle = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            _reserve(self._handle, size)
            _write_all(self._handle, memoryview(header), 0)
        except OSError as error:
            self.abort()
            raise _output_error(self.path, size, error) from error
        self._size = size

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, whole; each exactly once."""
        info = self._expected(name, tensor, tuple(tensor.shape))
        if name not in self._missing:
            raise FormatError(f"{self.path}: tensor {name!r} was already written")
        self._put(info.start, tensor)
        del self._missing[name]

    def commit(self) -> None:
        """Give the file its name, after every byte is on the disk."""
        if self._missing:
            raise FormatError(
                f"{self.path}: {len(self._missing)} tensors were never written, such as {next(iter(self._missing))!r}"
            )
        try:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1
            self._partial.replace(self.path)
        except OSError as error:
            raise _output_error(self.path, self._size, error) from error

    def abort(self) -> None:
        """Remove what was written."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _expected(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {name!r} was not announced")
        if (tensor.dtype, shape) != (info.dtype, info.shape):
            raise FormatError(
                f"{self.path}: tensor {name!r} was announced as {info.dtype} {list(info.shape)}, "
                f"got {tensor.dtype} {list(shape)}"
            )
        return info

    def _put(self, offset: int, tensor: Tensor) -> None:
        try:
            _write_all(self._handle, _bytes_of(tensor.detach().cpu().contiguous()), offset)
        except OSError as error:
            raise _output_error(self.path, self._size, error) from error


def header_bytes(tensors: Specs, metadata: Mapping[str, str] | None = None) -> int:
    """How many bytes the header of a file with these tensors takes, the leading length included."""
    return len(_layout(tensors, metadata)[0])


def _layout(tensors: Specs, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, TensorInfo]]:
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


def _read_header(handle: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = os.fstat(handle).st_size
    if size < 8:
        raise FormatError(f"{path}: {size} bytes are no safetensors file; it is cut short, download or copy it again")
    length = int.from_bytes(_pread(handle, 8, 0), "little")
    if length > HEADER_BYTES_MAX:
        raise FormatError(
            f"{path}: its header claims {length} bytes, more than {HEADER_BYTES_MAX}: no safetensors file"
        )
    if 8 + length > size:
        raise FormatError(
            f"{path}: its header claims {length} bytes, but the file has {size}; download or copy it again"
        )
    entries = _parse(_pread(handle, length, 8), path)
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must hold texts by name")
    infos = [_entry(name, entry, 8 + length, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _require_dense(infos, 8 + length, size, path)
    return {info.name: info for info in infos}, metadata


def _parse(text: bytes, path: Path) -> dict[str, Any]:
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


def _entry(name: str, entry: object, base: int, path: Path) -> TensorInfo:
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


def _require_dense(infos: list[TensorInfo], base: int, size: int, path: Path) -> None:
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


def _pread(handle: int, count: int, offset: int) -> bytes:
    pieces = []
    while count:
        piece = os.pread(handle, min(count, READ_BYTES), offset)
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The contiguous CPU tensor's own memory as bytes."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.flatten().view(torch.uint8).numpy().data


def _write_all(handle: int, rest: memoryview, offset: int) -> None:
    while rest:
        count = os.pwrite(handle, rest[:READ_BYTES], offset)
        offset += count
        rest = rest[count:]


def _reserve(handle: int, size: int) -> None:
    """Take the disk space now, so that a full disk is found before the work; file systems without that are let off."""
    try:
        if size:
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _output_error(path: Path, size: int, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return OutputError(
            f"{path}: the disk is full: {size} bytes are needed, {free} are free; free some room or choose another -o"
        )
    return OutputError(f"{path}: cannot be written: {error.strerror or error}")
