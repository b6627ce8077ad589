"""STUB, replaced by the files branch."""
from __future__ import annotations
from pathlib import Path
from torch import Tensor
from halfbin.formats.safetensors import SafetensorsFile, TensorInfo
class Checkpoint:
    def __init__(self, path: Path) -> None:
        self.path = path; self.file = SafetensorsFile(path / "model.safetensors")
        self.names = tuple(self.file.tensors)
        self.num_bytes = sum(i.num_bytes for i in self.file.tensors.values())
    def info(self, name: str) -> TensorInfo: return self.file.tensors[name]
    def read(self, name: str) -> Tensor: return self.file.read(name)
    def close(self) -> None: pass
def open_checkpoint(directory: Path) -> Checkpoint: return Checkpoint(Path(directory))
