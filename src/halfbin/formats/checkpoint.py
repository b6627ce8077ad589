"""The weights of a Hugging Face directory: one safetensors file, many with an index, or pickles read without running them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from halfbin.errors import FormatError, did_you_mean
from halfbin.formats._json import parse_json
from halfbin.formats.safetensors import SafetensorsFile, TensorInfo
from halfbin.formats.torch_pickle import PickleShard

INDEX_BYTES_MAX = 100 * 10**6


class Shard(Protocol):
    """One weight file, opened and checked."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop of the first dimension, in memory of their own."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Checkpoint:
    """All tensors of a directory by name, read one at a time."""

    def __init__(self, directory: Path, shards: list[Shard]) -> None:
        self.path = directory
        self._shards = shards
        self._owner: dict[str, Shard] = {}
        self._copies: dict[str, str] = {}
        for shard in shards:
            for name in shard.tensors:
                if name in self._owner:
                    first = self._owner[name].path.name
                    raise FormatError(
                        f"{directory}: tensor {name!r:.200} is in both {first} and {shard.path.name}; remove the stale one"
                    )
                self._owner[name] = shard

    def add_copies(self, copies: Mapping[str, str]) -> None:
        """From now on hold the same tensors under more names: new name -> name."""
        self._copies |= copies
        self._owner |= {new: self._shard_of(name) for new, name in copies.items()}

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
        """Bytes of all tensors, without headers; each once."""
        return sum(self.info(name).num_bytes for name in self._owner if name not in self._copies)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; each once."""
        return sum(self.info(name).numel for name in self._owner if name not in self._copies)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The first file's metadata."""
        return self._shards[0].metadata

    def info(self, name: str) -> TensorInfo:
        """The header's entry for one tensor."""
        return self._shard_of(name).tensors[self._copies.get(name, name)]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._shard_of(name).read(self._copies.get(name, name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop of the first dimension, in memory of their own."""
        return self._shard_of(name).read_rows(self._copies.get(name, name), start, stop)

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
            raise FormatError(f"{self.path}: there is no tensor {name!r}{did_you_mean(name, self._owner)}")
        return self._owner[name]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open the weights of a directory; headers are checked, no tensor is read.

    Raises:
      FormatError: no weights, a missing, cut or broken file, or an index that does not fit its files.
    """
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise FormatError(f"{directory}: expected a Hugging Face model directory, found {found}; check the path")
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
    try:
        size = path.stat().st_size
        if size > INDEX_BYTES_MAX:
            raise FormatError(f"{path}: {size} bytes are too many for an index; expected at most {INDEX_BYTES_MAX}")
        text = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    index = parse_json(text, f"{path}: the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise FormatError(f"{path}: expected a weight_map from tensor names to file names")
    return weight_map


def _inside(directory: Path, name: str) -> Path:
    """The path of a file that an index names: a plain file name, of a file that lies in this very directory."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise FormatError(
            f"{directory}: its index names {name!r:.200}, which is no plain file name; refusing to leave the directory"
        )
    path = directory / name
    try:
        present, target = path.is_file(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte in it, a ring of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(
            f"{directory}: its index names {name!r:.200}, which cannot be a file: {reason!s:.200}"
        ) from error
    if not present:
        raise FormatError(
            f"{directory}: its index names {name!r:.200}, which is missing; download or copy the model again"
        )
    if not any(target.is_relative_to(root) for root in _homes(directory.resolve())):
        raise FormatError(
            f"{directory}: its index names {name}, a link that leaves the directory, to {target}; "
            "put the file itself there if you trust it"
        )
    return path


def _homes(directory: Path) -> list[Path]:
    """Where a model's files may lie: in its directory, or in the blobs of the Hugging Face cache that it is a snapshot of.

    That cache is models--owner--name/snapshots/<revision>/<file>, each a link to models--owner--name/blobs/<hash>.
    """
    cached = directory.parent.name == "snapshots"
    return [directory, directory.parents[1] / "blobs"] if cached else [directory]


def _require_indexed(checkpoint: Checkpoint, weight_map: Mapping[str, str]) -> None:
    """The index and the files must tell the same story."""
    present = {name: checkpoint.file_of(name).name for name in checkpoint.names}
    for name, file in weight_map.items():
        if present.get(name) != file:
            instead = f"is in {present[name]}" if name in present else "no file holds"
            raise FormatError(
                f"{checkpoint.path}: its index says that {file} holds tensor {name!r:.200}, which {instead}; "
                "index and files are of two versions, download or copy the model again"
            )
    unlisted = next((name for name in present if name not in weight_map), None)
    if unlisted is not None:
        raise FormatError(
            f"{checkpoint.path}: {present[unlisted]} holds {unlisted!r:.200}, which its index does not list; "
            "index and files are of two versions, download or copy the model again"
        )
