"""Tensors that wait for a long time lie in files, mapped into memory: the system writes and reads their pages as it needs to.

A tensor keeps its identity, its shape and its bits; only what holds its numbers is another thing. So whoever has it, in the
middle of whatever model, need not know. Each file has lost its name by the time it is filled: it is gone with its tensor, or
with the process, however that ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import OutputError
from halfbin.models.walk import tensors_in

SMALLEST_BYTES = 64 * 1024  # what is worth a file


class MappedMemory:
    """Moves tensors into files of a folder.

    num_bytes: moved so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_bytes = 0

    def take(self, value: Any) -> None:
        """Move every large tensor inside containers and objects, in place.

        Left where they are: parameters, views into memory that is twice as large or more, and what lies in a file already.

        Raises:
          OutputError: the disk is full, or the folder cannot be written to.
        """
        moved: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            if not _worth_moving(tensor, storage):
                continue
            address = storage.data_ptr()
            if address not in moved:
                moved[address] = self._copy(storage)
            with torch.no_grad():
                tensor.set_(moved[address], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        path = ""
        try:
            descriptor, path = tempfile.mkstemp(prefix=".activations-", dir=self._folder)
            try:
                _reserve(descriptor, size)
            finally:
                os.close(descriptor)
            mapped: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(
                f"{self._folder}: activations of {size / 2**20:.0f} MiB cannot be kept in a file ({reason}) beside "
                f"{self.num_bytes / 2**20:.0f} MiB written so far; make room, take fewer samples, or keep them in memory: "
                "--activations memory"
            ) from error
        finally:
            if path:
                Path(path).unlink()
        mapped.copy_(storage)
        self.num_bytes += size
        found: torch.UntypedStorage = mapped
        return found


def _worth_moving(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    size = tensor.numel() * tensor.element_size()
    if isinstance(tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    return size >= SMALLEST_BYTES and storage.nbytes() < 2 * size and storage.filename is None


def _reserve(descriptor: int, size: int) -> None:
    """Take the file's place on the disk now: a page that finds none later would kill the process.

    Where the system cannot reserve, zeros are written.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        _write_zeros(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        _write_zeros(descriptor, size)


def _write_zeros(descriptor: int, size: int) -> None:
    piece = bytes(2**20)
    for start in range(0, size, len(piece)):
        left = memoryview(piece)[: size - start]
        while left:
            left = left[os.write(descriptor, left) :]
