"""STUB, replaced by the files branch."""
from __future__ import annotations
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import torch
from torch import Tensor
@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    @property
    def num_bytes(self) -> int: return self.end - self.start
class SafetensorsFile:
    def __init__(self, path: Any) -> None:
        from safetensors.torch import load_file
        self.data = load_file(str(path))
        self.tensors = {n: TensorInfo(n, t.dtype, tuple(t.shape), 0, t.numel()*t.element_size()) for n, t in self.data.items()}
        self.metadata: dict[str, str] = {}
    def read(self, name: str) -> Tensor: return self.data[name]
class SafetensorsWriter:
    def __init__(self, path: Any, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> None:
        self.path, self.specs, self.metadata, self.data = Path(path), dict(tensors), metadata, {}
    def write(self, name: str, tensor: Tensor) -> None:
        assert self.specs[name] == (tensor.dtype, tuple(tensor.shape)), (name, self.specs[name], tensor.dtype, tensor.shape)
        assert tensor.is_contiguous()
        self.data[name] = tensor
    def commit(self) -> None:
        from safetensors.torch import save_file
        assert set(self.data) == set(self.specs)
        save_file({n: t.clone() for n, t in self.data.items()}, str(self.path), self.metadata)
    def __enter__(self) -> SafetensorsWriter: return self
    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None: self.commit()
