"""Checkpoints on disk: one file per layout, and `open_quantized`, which finds out which one it is."""

from __future__ import annotations

from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.columns import ColumnCodec
from halfbin.formats.compressed_tensors import COMPRESSED_TENSORS, CompressedTensorsLayout
from halfbin.formats.compressed_tensors_client import ClientQuantizer
from halfbin.formats.halfbin import HALFBIN, HalfbinLayout
from halfbin.formats.inputs import InputCodec
from halfbin.formats.layout import HoldsColumns, Infos, PartInfo, Parts, Read, Shape, Stored, WeightCodec, WeightLayout
from halfbin.formats.plain import PlainLayout
from halfbin.formats.read import QuantizedCheckpoint, layout_named, open_quantized
from halfbin.formats.safetensors import SafetensorsFile, SafetensorsWriter, TensorInfo
from halfbin.formats.strict_json import read_json_object

__all__ = [
    "COMPRESSED_TENSORS",
    "HALFBIN",
    "Checkpoint",
    "ClientQuantizer",
    "ColumnCodec",
    "CompressedTensorsLayout",
    "HalfbinLayout",
    "HoldsColumns",
    "Infos",
    "InputCodec",
    "PartInfo",
    "Parts",
    "PlainLayout",
    "QuantizedCheckpoint",
    "Read",
    "SafetensorsFile",
    "SafetensorsWriter",
    "Shape",
    "Stored",
    "TensorInfo",
    "WeightCodec",
    "WeightLayout",
    "layout_named",
    "open_checkpoint",
    "open_quantized",
    "read_json_object",
]
