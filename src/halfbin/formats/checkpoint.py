"""The weights of a Hugging Face directory: one safetensors file, many with an index, or pickles read without running them."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbin.errors import FormatError
from halfbin.formats.safetensors import SafetensorsFile, TensorInfo

INDEX_BYTES_MAX = 100 * 10**6


class Shard(Protocol):
    """One weight file, opened and checked."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


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


class Checkpoint:
    """All tensors of a directory by name, read one at a time."""

    def __init__(self, directory: Path, shards: list[Shard]) -> None:
        self.path = directory
        self._shards = shards
        self._owner: dict[str, Shard] = {}
        for shard in shards:
            for name in shard.tensors:
                if name in self._owner:
                    first = self._owner[name].path.name
                    raise FormatError(f"{directory}: tensor {name!r} is in both {first} and {shard.path.name}")
                self._owner[name] = shard

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the files."""
        return tuple(self._owner)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return tuple(shard.path for shard in self._shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(self.info(name).num_bytes for name in self._owner)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.info(name).numel for name in self._owner)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The first file's metadata."""
        return self._shards[0].metadata

    def info(self, name: str) -> TensorInfo:
        """The header's entry for one tensor."""
        return self._shard_of(name).tensors[name]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._shard_of(name).read(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._shard_of(name).path

    def close(self) -> None:
        """Close all files."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _shard_of(self, name: str) -> Shard:
        if name not in self._owner:
            raise FormatError(f"{self.path}: there is no tensor {name!r}")
        return self._owner[name]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open the weights of a directory; headers are checked, no tensor is read.

    Raises:
      FormatError: no weights, a missing, cut or broken file, or an index that does not fit its files.
    """
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise FormatError(f"{directory}: expected a Hugging Face model directory, found {found}")
    shards: list[Shard] = []
    try:
        weight_map = None
        for kind, name in _weight_sources(directory):
            if kind == "index":
                weight_map = _read_index(directory / name)
                shards.extend(_open(_inside(directory, file)) for file in dict.fromkeys(weight_map.values()))
            else:
                shards.append(_open(directory / name))
        checkpoint = Checkpoint(directory, shards)
        if weight_map is not None:
            _require_indexed(checkpoint, weight_map)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return checkpoint


def _weight_sources(directory: Path) -> list[tuple[str, str]]:
    """What to open: an index or a single file, safetensors before pickles."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (directory / f"{stem}.{ending}.index.json").is_file():
            return [("index", f"{stem}.{ending}.index.json")]
        if (directory / f"{stem}.{ending}").is_file():
            return [("file", f"{stem}.{ending}")]
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:
        return [("file", others[0])]
    if others:
        raise FormatError(
            f"{directory}: {len(others)} safetensors files but no model.safetensors.index.json that says which belong "
            f"together ({', '.join(others[:3])}); a download may have missed it"
        )
    present = sorted(path.name for path in directory.iterdir())[:8]
    raise FormatError(f"{directory}: no weights; expected model.safetensors, found {', '.join(present) or 'nothing'}")


def _open(path: Path) -> Shard:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleShard(path)


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > INDEX_BYTES_MAX:
        raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for an index")
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise FormatError(f"{path}: expected a weight_map from tensor names to file names")
    return weight_map


def _inside(directory: Path, name: str) -> Path:
    """The path of a file that an index names: a plain file name, in this very directory."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise FormatError(
            f"{directory}: its index names {name!r}, which is no plain file name; refusing to leave the directory"
        )
    path = directory / name
    if not path.is_file():
        raise FormatError(f"{directory}: its index names {name}, which is missing; download or copy the model again")
    return path


def _require_indexed(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> None:
    """The index and the files must tell the same story."""
    present = {name: checkpoint.file_of(name).name for name in checkpoint.names}
    for name, file in weight_map.items():
        if present.get(name) != file:
            raise FormatError(
                f"{checkpoint.path}: its index says that {file} holds tensor {name!r}, "
                f"which {'is in ' + present[name] if name in present else 'no file holds'}"
            )
    unlisted = [name for name in present if name not in weight_map]
    if unlisted:
        raise FormatError(
            f"{checkpoint.path}: {present[unlisted[0]]} holds {unlisted[0]!r}, which its index does not list"
        )


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
