"""What a weight layout must be able to do: say how a quantized tensor lies on disk, write it so, and read it back.

A *codec* knows one tensor: which stored tensors ("parts") a `QTensor` becomes, and back. A *layout* is a codec that also
knows the checkpoint: which tensors it refuses and why, and the `quantization_config` that tells a client what it finds.
Names here are the original tensors' names ("model.layers.0.mlp.up_proj.weight"), unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from halfbin.tensor import ColumnSpec, InputQuantizer, InputScheme, PackedTensor, QTensor, Scheme

if TYPE_CHECKING:
    from halfbin.formats.columns import ColumnCodec
    from halfbin.formats.inputs import InputCodec

Shape: TypeAlias = tuple[int, ...]
Parts: TypeAlias = dict[str, tuple[torch.dtype, Shape]]
Read: TypeAlias = Callable[[str], Tensor]

ROWS_ALIGNED = 32  # codes that run down a column fill whole 32-bit words after so many rows, whatever their width


class PartInfo(Protocol):
    """What a checkpoint's header says of a stored tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type on disk."""
        ...

    @property
    def shape(self) -> Shape:
        """Its shape on disk."""
        ...


Infos: TypeAlias = Mapping[str, PartInfo]


class WeightCodec(Protocol):
    """One tensor <-> its parts. Nothing is lost: decode(encode(q)) has the codes, scales and zero points of q."""

    def tensors(self, name: str, shape: Shape, scheme: Scheme) -> Parts:
        """The exact types and shapes of the parts that `name` becomes; known before any weight is read."""
        ...

    def encode(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """The parts, contiguous, as `tensors` announced them.

        When q holds some rows of a weight, these are the same rows of its parts, but for those that `fixed` gives. The
        rows must begin at a multiple of ROWS_ALIGNED and of the tile's height.
        """
        ...

    def fixed(self, name: str, shape: Shape, scheme: Scheme) -> dict[str, Tensor]:
        """The parts that follow from shape and scheme alone; most codecs have none."""
        ...

    def decode(self, name: str, scheme: Scheme, shape: Shape, read: Read) -> QTensor:
        """Read the parts back. The file may be a stranger's: everything is checked.

        Raises:
          FormatError: a part that is not what it must be; the message names it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized tensor that was found in a checkpoint."""

    scheme: Scheme
    shape: Shape
    codec: WeightCodec  # reads it; a layout may have several
    hidden: tuple[str, ...] = ()  # stored beside it and no weight of the model: scales of activations and the like
    inputs: InputCodec | None = None  # how its layer's inputs are quantized; None: they are not
    unclear_inputs: str = ""  # why `inputs` cannot be told, where the configuration says more than we read
    columns: ColumnCodec | None = None  # of its columns in floating point; None: all are codes


class WeightLayout(WeightCodec, Protocol):
    """How quantized weights lie in a checkpoint, and how the inputs of their layers are quantized, where they are."""

    @property
    def name(self) -> str:
        """What --format calls it."""
        ...

    def tensors(self, name: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> Parts:
        """Of a weight whose layer's inputs are quantized as well, those of a static scheme among them."""
        ...

    def encode(self, name: str, q: QTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts that `tensors` announced for the quantizer's scheme."""
        ...

    def fixed(self, name: str, shape: Shape, scheme: Scheme, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts that follow from shape, scheme and inputs alone."""
        ...

    def refuses(self, module_class: str, shape: Shape, scheme: Scheme, inputs: InputScheme | None = None) -> str | None:
        """Why this layout, or its clients, cannot hold such a tensor, and what to do instead; None: it can.

        Args:
          module_class: class of the module that owns the tensor, such as "Linear"; "Expert" for one expert's matrix that is
            merged with others on loading; "" when the tensor has no module of its own.
          shape: the tensor's shape as stored.
          scheme: what it would be rounded to.
          inputs: what its layer's inputs would be rounded to; None: they stay.
        """
        ...

    def config(
        self,
        tensors: Mapping[str, tuple[Scheme, Shape]],
        ignored: Sequence[str],
        inputs: Mapping[str, InputScheme] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """The `quantization_config` for config.json; empty when there should be none.

        Args:
          tensors: every quantized tensor, by its original name.
          ignored: names of the modules (no ".weight") of a quantizable class that keep their float weights.
          inputs: for those of the tensors whose layers' inputs are quantized, how.
          modules: what a framework calls the module of a tensor, for those where the name on disk is another.

        Raises:
          SchemeError: no client can read this mix of schemes.
        """
        ...

    def schemes(self, config: Mapping[str, object], infos: Infos, read: Read) -> dict[str, Stored]:
        """Which original tensors of a checkpoint are quantized, and how.

        Args:
          config: the checkpoint's `quantization_config`.
          infos: its stored tensors, by name.
          read: reads one of them; used for tiny ones only.

        Raises:
          FormatError: the configuration and the tensors do not fit each other, or are not known.
        """
        ...


@runtime_checkable
class HoldsPackedRows(Protocol):
    """A layout some of whose codes lie row by row as dense bits, so that who rounds may pack them in the same pass."""

    def row_multiple(self, scheme: Scheme, inputs: InputScheme | None = None) -> int | None:
        """The bytes of a packed row are a multiple of this; None: codes of this scheme lie otherwise."""
        ...

    def encode_packed(self, name: str, q: PackedTensor, inputs: InputQuantizer | None = None) -> dict[str, Tensor]:
        """The parts that `encode` gives, from codes that are packed in such rows."""
        ...


@runtime_checkable
class HoldsColumns(Protocol):
    """A layout that can keep some columns of a weight in floating point beside its codes."""

    def column_codec(self, name: str, shape: Shape, spec: ColumnSpec) -> ColumnCodec:
        """How they are stored; their parts come on top of those of the codes."""
        ...

    def with_columns(self, config: Mapping[str, object], columns: Mapping[str, ColumnSpec]) -> dict[str, object]:
        """The `quantization_config` once more, with what it must say of such columns: one entry or more, by tensor."""
        ...
