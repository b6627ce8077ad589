"""PyTorch pickles, opened without running what is in them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbin.errors import FormatError
from halfbin.formats.safetensors import TensorInfo


class PickleShard:
    """A PyTorch pickle, opened by torch's weights-only loading and mapped, never run."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`.

        Raises:
          FormatError: no zip archive of stored entries, or it holds anything but tensors by name.
        """
        self.path = path
        self.metadata: Mapping[str, str] = {}
        _require_plain_zip(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises its own kinds for what it refuses
            raise FormatError(
                f"{path}: torch's weights-only loading refuses it ({_first_line(error)}); halfbin never unpickles freely. "
                "Convert it to safetensors where you trust it"
            ) from error
        if not isinstance(state, dict) or not all(
            isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
        ):
            raise FormatError(f"{path}: expected tensors by name, got something else; convert it to safetensors")
        self._state: dict[str, Tensor] = state
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
            for name, tensor in state.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._state[name].clone()

    def close(self) -> None:
        """Let go of the mapped file."""
        self._state = {}


def _require_plain_zip(path: Path) -> None:
    """A weights archive stores its entries as they are: a compressed one may unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path}: not a zip archive as PyTorch writes it since 1.6 ({_first_line(error)}); older pickles can run code "
            "when they are opened. Convert it to safetensors where you trust it"
        ) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{path}: entry {entry.filename!r} is compressed, which PyTorch never does; refusing to unfold it"
            )
    total = math.fsum(entry.file_size for entry in entries)
    if total > path.stat().st_size:
        raise FormatError(f"{path}: its entries claim {total:.0f} bytes, more than the file has")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
