"""Open any checkpoint that we know the layout of, and read it by the original tensors' names, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from halfbin.errors import FormatError, RecipeError
from halfbin.formats.checkpoint import Checkpoint, open_checkpoint
from halfbin.formats.compressed_tensors import COMPRESSED_TENSORS
from halfbin.formats.halfbin import HALFBIN
from halfbin.formats.layout import Infos, Shape, Stored, WeightLayout
from halfbin.formats.plain import PlainLayout
from halfbin.formats.strict_json import read_json_object
from halfbin.tensor import ColumnSpec, InputQuantizer, InputScheme, MixedTensor, QTensor, Scheme, dequantize

QUANTIZED_LAYOUTS: dict[str, WeightLayout] = {layout.name: layout for layout in (COMPRESSED_TENSORS, HALFBIN)}


def layout_named(name: str, dtype: torch.dtype = torch.float32) -> WeightLayout:
    """The layout that --format calls `name`.

    Args:
      name: "compressed-tensors", "halfbin" or "safetensors".
      dtype: type of plain weights, where the layout is "safetensors".

    Raises:
      RecipeError: no such layout.
    """
    if name == PlainLayout.name:
        return PlainLayout(dtype)
    if name not in QUANTIZED_LAYOUTS:
        raise RecipeError(
            f"there is no format {name!r}; expected one of {', '.join([*QUANTIZED_LAYOUTS, PlainLayout.name])}"
        )
    return QUANTIZED_LAYOUTS[name]


class QuantizedCheckpoint:
    """A checkpoint seen through its layout: a quantized tensor has its original name, and reads as a `QTensor`."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, object]) -> None:
        """See `open_quantized`; `checkpoint` is closed with this."""
        self._checkpoint = checkpoint
        self.config = config  # of the model: what config.json holds
        quantization = _quantization_config(config)
        layout = _layout(quantization)
        self.layout_name = layout.name
        infos: Infos = {name: checkpoint.info(name) for name in checkpoint.names}
        self._stored: dict[str, Stored] = layout.schemes(quantization or {}, infos, checkpoint.read)
        self._parts = {
            name: (
                *stored.codec.tensors(name, stored.shape, stored.scheme),
                *(stored.inputs.parts() if stored.inputs else ()),
                *(stored.columns.parts() if stored.columns else ()),
            )
            for name, stored in self._stored.items()
        }
        self.names = _joined(checkpoint.names, self._stored, self._parts)
        self._known = frozenset(self.names)

    @property
    def path(self) -> Path:
        """The directory, or the file."""
        return Path(self._checkpoint.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return self._checkpoint.num_bytes

    def scheme(self, name: str) -> Scheme | None:
        """What `name` was rounded to; None: it keeps its float values."""
        self._require(name)
        return self._stored[name].scheme if name in self._stored else None

    def inputs(self, name: str) -> InputScheme | None:
        """What the inputs of the layer of `name` are rounded to; None: they stay.

        Raises:
          FormatError: the configuration says that they are quantized, but not so that it is understood.
        """
        self._require(name)
        stored = self._stored.get(name)
        if stored is not None and stored.unclear_inputs:
            raise FormatError(stored.unclear_inputs)
        return stored.inputs.inputs if stored is not None and stored.inputs else None

    def input_quantizer(self, name: str) -> InputQuantizer | None:
        """What quantizes them, with the scale that a static one needs, and the features that it always leaves out.

        Raises:
          FormatError: as `inputs`, or the scale or the numbers of columns are not what they must be.
        """
        if self.inputs(name) is None:
            return None
        stored = self._stored[name]
        assert stored.inputs is not None
        quantizer = stored.inputs.decode(self._checkpoint.read)
        return quantizer if stored.columns is None else quantizer.keeping(stored.columns.ids(self._checkpoint.read))

    def columns(self, name: str) -> ColumnSpec | None:
        """How many of a weight's columns are kept in floating point beside its codes; None: none are."""
        self._require(name)
        stored = self._stored.get(name)
        return stored.columns.spec if stored is not None and stored.columns else None

    def shape(self, name: str) -> Shape:
        """The original tensor's shape."""
        self._require(name)
        return self._stored[name].shape if name in self._stored else tuple(self._checkpoint.info(name).shape)

    def bytes_of(self, name: str) -> int:
        """Bytes of everything stored for the original tensor: codes, scales, zero points, columns in floating point."""
        self._require(name)
        return sum(self._checkpoint.info(part).num_bytes for part in self._parts.get(name, (name,)))

    def read(self, name: str) -> QTensor | MixedTensor | Tensor:
        """One tensor: codes and scales where it is quantized, with what columns are in floating point; else its values.

        Raises:
          FormatError: what is stored is not what it claims to be; names the tensor and the checkpoint.
        """
        self._require(name)
        if name not in self._stored:
            return self._checkpoint.read(name)
        stored = self._stored[name]
        try:
            q = stored.codec.decode(name, stored.scheme, stored.shape, self._checkpoint.read)
            return q if stored.columns is None else stored.columns.decode(q, self._checkpoint.read)
        except FormatError as error:
            error.add_note(f"while reading {name!r} ({stored.scheme}) from {self.path}")
            raise

    def read_values(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One tensor's real values in `dtype`, dequantized where it is quantized; integer tensors keep their type."""
        tensor = self.read(name)
        if isinstance(tensor, QTensor | MixedTensor):
            return dequantize(tensor, dtype)
        return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor

    def close(self) -> None:
        """Close the files."""
        self._checkpoint.close()

    def __enter__(self) -> QuantizedCheckpoint:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _require(self, name: str) -> None:
        if name not in self._known:
            raise FormatError(f"{self.path} has no tensor {name!r}")


def open_quantized(directory: str | Path) -> QuantizedCheckpoint:
    """Open a model directory of the layout that its config.json names; without one it is a plain float checkpoint.

    Only headers and a few tiny tensors are read now.

    Raises:
      FormatError: a file that is not what it claims to be, or a layout that is not read yet; names the file.
    """
    path = Path(directory)
    config = read_json_object(path / "config.json")
    checkpoint = open_checkpoint(path)
    try:
        return QuantizedCheckpoint(checkpoint, config)
    except FormatError as error:
        checkpoint.close()
        error.add_note(f"while opening {path}")
        raise
    except BaseException:
        checkpoint.close()
        raise


def _quantization_config(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """Where transformers looks for it: at the top, or in the text model's part."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is None and config.get("compression_config"):
        raise FormatError("config.json has a compression_config, of compressed-tensors before 0.5, which is not read")
    if found is not None and not isinstance(found, dict):
        raise FormatError("config.json: quantization_config must be a table")
    return found


def _layout(quantization: Mapping[str, object] | None) -> WeightLayout:
    if not quantization:
        return PlainLayout()
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZED_LAYOUTS:
        raise FormatError(
            f"config.json has quant_method {str(method)[:80]!r}, which is not read yet; known are "
            f"{', '.join(QUANTIZED_LAYOUTS)}: start from the float checkpoint it was made from"
        )
    return QUANTIZED_LAYOUTS[method]


def _joined(
    names: tuple[str, ...], stored: Mapping[str, Stored], parts: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Original names, in the order in which the first part of each is stored."""
    owner = {part: name for name, its in parts.items() for part in its}
    hidden = {part for one in stored.values() for part in one.hidden}
    return tuple(dict.fromkeys(owner.get(name, name) for name in names if name not in hidden))
