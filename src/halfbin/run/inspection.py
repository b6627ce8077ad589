"""What a checkpoint on disk holds: per tensor its scheme, its bytes and how its codes are used. Reads, changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbin.formats.read import open_quantized
from halfbin.run import jsonable
from halfbin.run.events import Event, OnEvent
from halfbin.run.histogram import finite_levels
from halfbin.tensor.mixed import MixedTensor, split
from halfbin.tensor.qtensor import QTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeUse:
    """How often each value of the format is taken.

    levels: the finite values, in steps of the scale, rising.  counts: elements on each.  not_finite: codes of NaN or infinity.
    """

    levels: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int = 0

    @property
    def saturated(self) -> int:
        """Elements on the lowest or the highest level: what was clipped, and each group's own maximum."""
        return self.counts[0] + self.counts[-1]

    @property
    def unused(self) -> int:
        """Levels that no element takes: bits paid for and not used."""
        return sum(count == 0 for count in self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInspection:
    """One tensor of the original model as it lies on disk. Exactly one of `scheme` and `dtype` is given.

    codes:         how those of a quantized tensor are used, without the columns that are not codes.
    float_columns: how many columns are kept in floating point beside the codes.
    column_dtype:  the type they have; None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    scheme: str | None = None
    dtype: str | None = None
    codes: CodeUse | None = None
    float_columns: int = 0
    column_dtype: str | None = None

    @property
    def num_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of elements; 0 for an empty tensor."""
        return 8 * self.bytes / max(self.num_weights, 1)

    @property
    def weights(self) -> str:
        """What it is stored as: the scheme, and columns beside it, or the floating type."""
        beside = f" + {self.float_columns} {self.column_dtype}" if self.float_columns else ""
        return f"{self.scheme}{beside}" if self.scheme else self.dtype or ""

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        found = {**jsonable.to_json(self), "num_weights": self.num_weights, "bits_per_weight": self.bits_per_weight}
        if self.codes is not None:
            found["codes"] |= {"saturated": self.codes.saturated, "unused": self.codes.unused}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A whole checkpoint. path: as the user named it.  layout: how it lies on disk.  bytes: all weight files together."""

    path: str
    layout: str
    bytes: int
    tensors: tuple[TensorInspection, ...]

    @property
    def num_weights(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def quantized(self) -> tuple[TensorInspection, ...]:
        """The tensors that hold codes."""
        return tuple(tensor for tensor in self.tensors if tensor.scheme is not None)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over elements, of the quantized tensors; None when there is none."""
        num_weights = sum(tensor.num_weights for tensor in self.quantized)
        return 8 * sum(tensor.bytes for tensor in self.quantized) / num_weights if num_weights else None

    @property
    def bits_per_weight_total(self) -> float:
        """Stored bits over elements, of everything."""
        return 8 * self.bytes / max(self.num_weights, 1)

    def to_json(self) -> dict[str, Any]:
        """The fields, and what follows from them."""
        return {
            "inspection_version": 1,
            "path": self.path,
            "layout": self.layout,
            "bytes": self.bytes,
            "num_weights": self.num_weights,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_total": self.bits_per_weight_total,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def code_use(weight: QTensor | MixedTensor) -> CodeUse:
    """Count how often each value of the format is taken by the elements that are stored as codes."""
    q = weight.q if isinstance(weight, MixedTensor) else weight
    used = q.codes[weight.rounded] if isinstance(weight, MixedTensor) else q.codes
    fmt = q.scheme.format
    values = fmt.decode(fmt.codes, torch.float64)
    first = int(fmt.codes[0])
    counts = torch.bincount(used.flatten().to(torch.int64) - first, minlength=len(values))
    levels = finite_levels(fmt)
    position = {level: i for i, level in enumerate(levels)}
    totals = [0] * len(levels)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if math.isfinite(value):
            totals[position[value + 0.0]] += count
    return CodeUse(levels=tuple(levels), counts=tuple(totals), not_finite=int(counts.sum()) - sum(totals))


def inspect_tensor(
    name: str, num_bytes: int, read: Callable[[], QTensor | MixedTensor | torch.Tensor]
) -> TensorInspection:
    """Describe one tensor; `read` is called once, and its result is not kept."""
    tensor = read()
    if isinstance(tensor, QTensor | MixedTensor):
        q, columns = split(tensor)
        return TensorInspection(
            name=name,
            shape=tensor.shape,
            bytes=num_bytes,
            scheme=str(q.scheme),
            codes=code_use(tensor),
            float_columns=0 if columns is None else columns.spec.count,
            column_dtype=None if columns is None else str(columns.spec.dtype).removeprefix("torch."),
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInspection(name=name, shape=tuple(tensor.shape), bytes=num_bytes, dtype=dtype)


def inspect_checkpoint(directory: Path, on_event: OnEvent | None = None) -> Inspection:
    """Describe every tensor of the checkpoint in `directory`, one in memory at a time.

    Raises:
      FormatError: the directory holds no checkpoint, or not the one that its config.json speaks of.
    """
    with open_quantized(directory) as checkpoint:
        tensors = []
        for done, name in enumerate(checkpoint.names, start=1):
            tensors.append(inspect_tensor(name, checkpoint.bytes_of(name), functools.partial(checkpoint.read, name)))
            if on_event:
                on_event(Event("inspecting", done, len(checkpoint.names), "tensors", name))
        return Inspection(
            path=str(directory), layout=checkpoint.layout_name, bytes=checkpoint.num_bytes, tensors=tuple(tensors)
        )
