"""Columns of a weight that stay in floating point, beside its codes: two tensors of their own.

    {name}.column_ids   int32 [k], rising: which input features
    {name}.columns      f16, bf16 or f32: [out_features, k] of a weight [out, in], [k, out_features] of one stored [in, out]

How many, of which type and along which axis is said by the layout's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError, FormatError, SchemeError
from halfbin.formats.checks import read_as
from halfbin.formats.layout import Parts, Read, Shape
from halfbin.tensor import ColumnSpec, FloatColumns, MixedTensor, QTensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
KEYS = {"count", "dtype", "axis"}


@dataclass(frozen=True, slots=True)
class ColumnCodec:
    """One weight's columns in floating point <-> the parts that they are stored as."""

    name: str  # of the weight
    shape: Shape  # of the weight
    spec: ColumnSpec

    def parts(self) -> Parts:
        """Types and shapes."""
        return {
            f"{self.name}.column_ids": (torch.int32, (self.spec.count,)),
            f"{self.name}.columns": (self.spec.dtype, self.spec.values_shape(self.shape)),
        }

    def encode(self, columns: FloatColumns) -> dict[str, Tensor]:
        """The parts, contiguous, as announced.

        Raises:
          SchemeError: other columns than were announced.
        """
        if columns.spec != self.spec:
            raise SchemeError(f"columns were announced as {self.spec}, and are {columns.spec}")
        return dict(zip(self.parts(), (columns.ids.cpu(), columns.values.cpu().contiguous()), strict=True))

    def ids(self, read: Read) -> Tensor:
        """Which columns: int32 [k]. The file may be a stranger's: everything is checked.

        Raises:
          FormatError: they are not numbers of this weight's columns, rising.
        """
        name, spec = next(iter(self.parts().items()))
        ids = read_as(read, name, *spec)
        size = self.shape[self.spec.axis]
        rising = bool(
            (ids[1:] > ids[:-1]).all()
        )  # no differences are taken: those of a stranger's numbers may overflow
        if not (rising and int(ids[0]) >= 0 and int(ids[-1]) < size):
            raise FormatError(
                f"tensor {name!r} must hold numbers of columns from 0 to {size - 1}, rising, none twice; the file is damaged"
            )
        return ids

    def decode(self, q: QTensor, read: Read) -> MixedTensor:
        """Read the parts back, and put them beside the codes. Everything is checked.

        Raises:
          FormatError: a part that is not what it must be; the message names it.
        """
        name, spec = list(self.parts().items())[1]
        ids, values = self.ids(read), read_as(read, name, *spec)
        try:
            return MixedTensor(q, FloatColumns(ids, values, self.spec.axis))
        except (SchemeError, DataError) as error:
            raise FormatError(f"tensor {name!r}: {error}; the file is damaged") from error


def columns_entry(spec: ColumnSpec) -> dict[str, object]:
    """What a configuration says of columns."""
    return {"count": spec.count, "dtype": str(spec.dtype).removeprefix("torch."), "axis": spec.axis}


def read_columns(name: str, entry: object, shape: Shape) -> ColumnCodec:
    """What `columns_entry` wrote about the columns of the weight `name` of `shape`; it may be a stranger's.

    Raises:
      FormatError: it is not such an entry, or does not fit the weight.
    """
    if not isinstance(entry, dict) or set(entry) != KEYS or not isinstance(entry["dtype"], str):
        raise FormatError(
            f"config.json: the columns of tensor {name!r} must have count, dtype and axis, got {entry!r:.80}"
        )
    count, axis, dtype = entry["count"], entry["axis"], DTYPES.get(entry["dtype"])
    if type(count) is not int or type(axis) is not int or dtype is None:
        raise FormatError(
            f"config.json: the columns of tensor {name!r} are some number of float16, bfloat16 or float32, got {entry!r:.80}"
        )
    try:
        spec = ColumnSpec(count=count, dtype=dtype, axis=axis)
        spec.values_shape(shape)
    except SchemeError as error:
        raise FormatError(f"config.json: the columns of tensor {name!r}: {error}") from error
    return ColumnCodec(name, shape, spec)
