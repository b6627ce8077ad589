"""PyTorch pickles, opened without running what is in them."""

from __future__ import annotations

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
            raise FormatError(
                f"{path}: expected tensors by name, got {_described(state)}; save model.state_dict() alone, as safetensors"
            )
        for name, tensor in state.items():
            _require_plain_tensor(path, name, tensor)
        self._state: dict[str, Tensor] = state
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
            for name, tensor in state.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._tensor(name).detach().clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop of the first dimension, in memory of their own."""
        tensor = self._tensor(name)
        if not tensor.ndim or not 0 <= start <= stop <= tensor.shape[0]:
            shape = list(tensor.shape)
            raise FormatError(f"{self.path}: tensor {name!r} of shape {shape} has no rows {start} to {stop}")
        return tensor[start:stop].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the mapped file."""
        self._state = {}

    def _tensor(self, name: str) -> Tensor:
        if name not in self._state:
            closed = "it was closed" if name in self.tensors else "there is no such tensor"
            raise FormatError(f"{self.path}: tensor {name!r} cannot be read: {closed}")
        return self._state[name]


def _require_plain_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Tensors that lie in the file: no sparse ones, and none whose strides make a few bytes look like terabytes."""
    where = f"{path}: tensor {name!r:.200}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise FormatError(
            f"{where} is {tensor.layout} on {tensor.device}; expected a plain dense tensor, convert it to safetensors"
        )
    size = path.stat().st_size
    if tensor.numel() * tensor.element_size() > size:
        raise FormatError(
            f"{where} {list(tensor.shape)[:8]} would take {tensor.numel() * tensor.element_size()} bytes, "
            f"the whole file has {size}; save a contiguous copy of it"
        )


def _require_plain_zip(path: Path) -> None:
    """A weights archive stores its entries as they are: a compressed one may unfold to any size."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            file.seek(0)
            if file.read(4) != b"PK\x03\x04":  # torch would take what stands before the archive for an old pickle
                raise zipfile.BadZipFile("something stands before the archive")
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path}: not a zip archive as PyTorch writes it since 1.6 ({_first_line(error)}); older pickles can run code "
            "when they are opened. Convert it to safetensors where you trust it"
        ) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{path}: entry {entry.filename!r:.200} is compressed, which PyTorch never does; refusing to unfold it"
            )
    if len({entry.filename for entry in entries}) != len(entries):
        raise FormatError(f"{path}: two of its entries have one name; which one is meant cannot be known")
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > size:
        raise FormatError(
            f"{path}: its entries claim {total} bytes, the whole file has {size}; download or copy it again"
        )


def _described(state: object) -> str:
    """What somebody saved instead: its kind, or the first entry that is no tensor."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return next(
        f"{name!r:.80}: {type(value).__name__}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
