"""The safetensors container: a strict reader, and a writer that takes tensors one at a time.

    bytes 0..7      length n of the header, unsigned, little-endian
    bytes 8..8+n    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                    "__metadata__": {"key": "text"}}, filled up with spaces to a multiple of 8
    then            the tensors, without gaps or overlaps; offsets count from here

Spec: https://github.com/huggingface/safetensors. The library of that name wants all tensors of a file at once when it
writes, and maps files into memory when it reads; a model larger than memory can afford neither, hence this module. The
library also accepts duplicate names, ours refuses them. A stranger's file can only ever raise `FormatError`: every length
and offset is checked, in Python's unbounded integers, before anything is allocated. What a header may say is in
`_safetensors_header.py`.

Bytes are read into the tensor's own memory, so pages of the file never count as ours. Dropping them from the system's
cache afterwards (posix_fadvise) was tried and left out: the next pass over 1 GiB then ran at 0.3 to 0.7 GB/s from the disk
instead of 0.9 to 1.2 GB/s, and a cache gives way by itself when memory is wanted.
"""

from __future__ import annotations

import bisect
import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from halfbin.errors import FormatError, OutputError, did_you_mean
from halfbin.formats._safetensors_header import DTYPES, HEADER_BYTES_MAX, NAMES, Specs, TensorInfo, layout, parse
from halfbin.formats.writeback import begin_writing_back

__all__ = [
    "DTYPES",
    "NAMES",
    "SafetensorsFile",
    "SafetensorsWriter",
    "Specs",
    "TensorInfo",
    "header_bytes",
    "write_hollow",
]

IO_BYTES = 1 << 30  # one call moves at most about 2 GiB on Linux
WRITE_BACK_BYTES = 32 * 2**20  # after so many the disk is set to work


class SafetensorsFile:
    """An open file whose header has been checked. `tensors` keeps the order of the data. Threads may read at once."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`.

        Raises:
          FormatError: the file cannot be opened, or is not what it claims to be.
        """
        _require_little_endian(path)
        self.path = path
        self._handle = _open_regular(path)
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
        return self._read(info, (stop - start, *info.shape[1:]), info.start + start * _row_bytes(info))

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
        if self._handle < 0:
            raise FormatError(f"{self.path}: cannot be read any more, it was closed; open it again")
        if name not in self.tensors:
            raise FormatError(f"{self.path}: there is no tensor {name!r}")
        return self.tensors[name]

    def _read(self, info: TensorInfo, shape: tuple[int, ...], offset: int) -> Tensor:
        # Sizes were checked against the file's length when it was opened, so this allocates no more than that.
        tensor = torch.empty(shape, dtype=info.dtype)
        if not _read_into(self._handle, _bytes_of(tensor), offset, self.path):
            raise FormatError(f"{self.path}: tensor {info.name!r} ends early; the file was cut while it was open")
        return tensor


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand and arrive whole or in rows, in any order, from any thread.

    The bytes go to `path` + ".partial", which takes its name when everything is there and on the disk. As a context
    manager: commits at the end of the block, removes the partial file after an exception.
    """

    def __init__(self, path: Path, tensors: Specs, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and reserve the disk space.

        Raises:
          OutputError: the disk is too full, the file cannot be made, or the format cannot hold a tensor.
        """
        _require_little_endian(path)
        if path.is_dir():
            raise OutputError(f"{path}: is a directory; choose another name or remove it")
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        header, self._infos = layout(tensors, metadata)
        self._size = max((info.end for info in self._infos.values()), default=len(header))
        self._lock = threading.Lock()
        self._claimed: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}  # sorted byte ranges
        self._missing = {name: info.num_bytes for name, info in self._infos.items()}
        self._waiting = 0  # bytes that nobody asked the disk for yet
        self._handle = -1
        try:
            self._handle = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            _reserve(self._handle, self._size)
            _write_all(self._handle, memoryview(header), 0)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise _output_error(self.path, self._size, error) from error
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, whole; each exactly once."""
        info = self._expected(name, tensor)
        if tuple(tensor.shape) != info.shape:
            raise OutputError(f"{self._announced(info)}, got {list(tensor.shape)}")
        self._put(info, 0, tensor)

    def write_rows(self, name: str, start: int, tensor: Tensor) -> None:
        """Write rows of the first dimension, beginning with row `start`; each row exactly once."""
        info = self._expected(name, tensor)
        fits = info.shape and tensor.ndim == len(info.shape) and tuple(tensor.shape[1:]) == info.shape[1:]
        if not fits or not 0 <= start <= start + tensor.shape[0] <= info.shape[0]:
            raise OutputError(f"{self._announced(info)}, got {list(tensor.shape)} as its rows from {start} on")
        self._put(info, start * _row_bytes(info), tensor)

    def commit(self) -> None:
        """Give the file its name, after every byte is on the disk."""
        self._require_open()
        if self._missing:
            name, left = next(iter(self._missing.items()))
            raise OutputError(
                f"{self.path}: {len(self._missing)} tensors are not complete, such as {name!r}: "
                f"{left} of {self._infos[name].num_bytes} bytes were never written"
            )
        try:
            os.fsync(self._handle)
            self._partial.replace(self.path)
            os.close(self._handle)
            self._handle = -1
            _sync_directory(self.path.parent)
        except OSError as error:
            self.abort()
            raise _output_error(self.path, self._size, error) from error

    def abort(self) -> None:
        """Remove what was written; after a commit, or a second time, this does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()

    def _expected(self, name: str, tensor: Tensor) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise OutputError(
                f"{self.path}: tensor {name!r} was not announced{did_you_mean(name, self._infos) if self._infos else ''}"
            )
        if tensor.dtype != info.dtype:
            raise OutputError(f"{self._announced(info)}, got {tensor.dtype}")
        return info

    def _announced(self, info: TensorInfo) -> str:
        return f"{self.path}: tensor {info.name!r} was announced as {info.dtype} {list(info.shape)}"

    def _put(self, info: TensorInfo, begin: int, tensor: Tensor) -> None:
        """Write bytes from `begin` on, counted from the tensor's start."""
        source = _bytes_of(tensor.detach().cpu().contiguous())
        with self._lock:
            self._require_open()
            self._claim(info, begin, begin + len(source))
        try:
            _write_all(self._handle, source, info.start + begin)
        except OSError as error:
            raise _output_error(self.path, self._size, error) from error
        with self._lock:
            self._missing[info.name] -= len(source)
            if not self._missing[info.name]:
                del self._missing[info.name]
            self._waiting += len(source)
            if begin := self._waiting >= WRITE_BACK_BYTES:
                self._waiting = 0
        if begin:
            begin_writing_back(self._handle)

    def _claim(self, info: TensorInfo, begin: int, end: int) -> None:
        """Note a range of bytes as taken, or refuse it because another write took some of it."""
        ranges = self._claimed[info.name]
        at = bisect.bisect_left(ranges, (begin, end))
        before, after = ranges[:at][-1:], ranges[at:][:1]
        if info.name not in self._missing or (before and before[0][1] > begin) or (after and after[0][0] < end):
            raise OutputError(
                f"{self.path}: tensor {info.name!r} was already written, bytes {begin} to {end} in part or whole"
            )
        ranges.insert(at, (begin, end))

    def _require_open(self) -> None:
        if self._handle < 0:
            raise OutputError(f"{self.path}: was already committed or aborted; make a new writer")


def header_bytes(tensors: Specs, metadata: Mapping[str, str] | None = None) -> int:
    """How many bytes the header of a file with these tensors takes, the leading length included."""
    return len(layout(tensors, metadata)[0])


def write_hollow(path: Path, tensors: Specs, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file with the header of these tensors and a hole where their data would be: it takes no disk space.

    Raises:
      OutputError: the format cannot hold a tensor.
    """
    header, infos = layout(tensors, metadata)
    path.write_bytes(header)
    os.truncate(path, max((info.end for info in infos.values()), default=len(header)))


def _require_little_endian(path: Path) -> None:
    if sys.byteorder != "little":
        raise FormatError(f"{path}: safetensors is little-endian and this machine is not; halfbin does not swap bytes")


def _open_regular(path: Path) -> int:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked first, as opening a pipe would wait for its writer
            raise FormatError(f"{path}: expected a file, found a directory or device")
        return os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be opened: {reason}; check its permissions and the disk") from error


def _read_header(handle: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = os.fstat(handle).st_size
    if size < 8:
        raise FormatError(f"{path}: {size} bytes are no safetensors file; it is cut short, download or copy it again")
    length = int.from_bytes(_pread(handle, 8, 0, path), "little")
    if length > HEADER_BYTES_MAX:
        raise FormatError(
            f"{path}: its header claims {length} bytes, more than {HEADER_BYTES_MAX}: no safetensors file"
        )
    if 8 + length > size:
        raise FormatError(
            f"{path}: its header claims {length} bytes, but the file has {size}; download or copy it again"
        )
    return parse(_pread(handle, length, 8, path), size, path)


def _pread(handle: int, count: int, offset: int, path: Path) -> bytes:
    buffer = bytearray(count)
    if not _read_into(handle, memoryview(buffer), offset, path):
        raise FormatError(f"{path}: was cut while it was being opened; try again")
    return bytes(buffer)


def _read_into(handle: int, rest: memoryview, offset: int, path: Path) -> bool:
    """Fill `rest` with the file's bytes from `offset` on; False where the file ends first."""
    while rest:
        try:
            count = os.preadv(handle, [rest[:IO_BYTES]], offset)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}; check the disk") from error
        if count == 0:
            return False
        offset += count
        rest = rest[count:]
    return True


def _row_bytes(info: TensorInfo) -> int:
    return info.num_bytes // info.shape[0] if info.shape[0] else 0


def _bytes_of(tensor: Tensor) -> memoryview:
    """The contiguous CPU tensor's own memory as bytes."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.flatten().view(torch.uint8).numpy().data


def _write_all(handle: int, rest: memoryview, offset: int) -> None:
    while rest:
        count = os.pwrite(handle, rest[:IO_BYTES], offset)
        offset += count
        rest = rest[count:]


def _reserve(handle: int, size: int) -> None:
    """Take the disk space now, so that a full disk is found before the work; else at least look whether it is there."""
    try:
        os.posix_fallocate(handle, 0, size)
    except (AttributeError, OSError) as error:  # AttributeError: macOS has no such call
        if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        free = os.fstatvfs(handle)
        if free.f_bavail * free.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        os.ftruncate(handle, size)


def _sync_directory(directory: Path) -> None:
    """Put the new name on the disk too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def _output_error(path: Path, size: int, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return OutputError(
            f"{path}: the disk is full: {size} bytes are needed, {free} are free; free some room or choose another -o"
        )
    return OutputError(f"{path}: cannot be written: {error.strerror or error}; {size} bytes are needed")
