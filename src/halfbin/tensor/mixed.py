"""A weight in two precisions: codes, and beside them a few input features' columns in floating point.

A layer multiplies each column of its weight [out_features, in_features] by one input feature. Where a feature is far larger
than others, or its column matters more, it is kept out of the rounding: its codes are those of zeros, so that it sets no
scale, and its values lie beside them. LLM.int8() keeps the columns of outlier features so (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339, section 3.2); OWQ and SpQR keep those that are most sensitive.

What is the k-th column of a weight [out, in] is the k-th row of one that is stored transposed, [in, out]: hence `axis`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.tensor.qtensor import QTensor, dequantize

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what columns may be held in


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """How many columns are in floating point, of which type, and along which axis of the weight they are counted.

    count: at least 1.
    dtype: float16, bfloat16 or float32.
    axis:  1 for a weight [out_features, in_features]; 0 for [in_features, out_features].
    """

    count: int
    dtype: torch.dtype
    axis: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.dtype not in FLOATS or self.axis not in (0, 1):
            raise SchemeError(
                f"{self.count} columns of {self.dtype} along axis {self.axis}: expected 1 or more, of 16- or 32-bit floats, "
                "along axis 0 or 1"
            )

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of all these columns of a weight of `shape`.

        Raises:
          SchemeError: the weight is no matrix, or has fewer columns.
        """
        if len(shape) != 2 or self.count > shape[self.axis]:
            raise SchemeError(f"a tensor of shape {list(shape)} has no {self.count} columns along axis {self.axis}")
        return (shape[0], self.count) if self.axis else (self.count, shape[1])

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of the columns and of their numbers."""
        rows, columns = self.values_shape(shape)
        return rows * columns * self.dtype.itemsize + self.count * torch.int32.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class FloatColumns:
    """Some input features' columns of a weight.

    ids:    int32 [k], k > 0, rising, none twice.
    values: float [out, k] for a weight [out, in], axis = 1; [k, out] for one stored [in, out], axis = 0; finite.
    """

    ids: Tensor
    values: Tensor
    axis: int = 1

    def __post_init__(self) -> None:
        spec = self.spec  # refuses what it must
        if self.values.ndim != 2 or self.values.shape[self.axis] != spec.count or self.ids.ndim != 1:
            raise SchemeError(
                f"{list(self.ids.shape)} numbers of columns do not fit values {list(self.values.shape)} along axis {self.axis}"
            )
        if self.ids.dtype != torch.int32 or not bool((self.ids[1:] > self.ids[:-1]).all()) or int(self.ids[0]) < 0:
            raise SchemeError("numbers of columns are int32, 0 or more, rising, and none comes twice")
        if not bool(torch.isfinite(self.values).all()):
            raise DataError(f"columns hold NaN or infinity as {self.values.dtype}")

    @property
    def spec(self) -> ColumnSpec:
        """Count, type and axis."""
        return ColumnSpec(count=self.ids.numel(), dtype=self.values.dtype, axis=self.axis)

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Which elements of a weight of `shape` lie in these columns: bool, a view of that shape."""
        inside = torch.zeros(shape[self.axis], dtype=torch.bool, device=self.ids.device)
        inside[self.ids.to(torch.int64)] = True
        return (inside if self.axis else inside[:, None]).expand(shape)

    def as_stored(self, *, transposed: bool) -> FloatColumns:
        """Columns of a matrix [out, in] for the weight as it is stored: [in, out] where it is transposed."""
        return FloatColumns(self.ids, self.values.T.contiguous(), 1 - self.axis) if transposed else self

    def to(self, device: torch.device | str) -> FloatColumns:
        """The same on another device."""
        return FloatColumns(self.ids.to(device), self.values.to(device), self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class MixedTensor:
    """Codes for most of a weight, and floating point for some columns; what the codes say of those is not looked at."""

    q: QTensor
    columns: FloatColumns

    def __post_init__(self) -> None:
        columns, shape = self.columns, self.q.shape
        expected = columns.spec.values_shape(shape)
        if tuple(columns.values.shape) != expected:
            raise SchemeError(
                f"columns {list(columns.values.shape)} are none of a weight {list(shape)}; expected {list(expected)}"
            )
        if int(columns.ids[-1]) >= shape[columns.axis]:
            raise SchemeError(
                f"there is no column {int(columns.ids[-1])} in a weight {list(shape)} along axis {columns.axis}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.q.shape

    @property
    def num_bits(self) -> int:
        """Everything stored: codes, scales, zero points, columns and their numbers; without padding."""
        return self.q.scheme.num_bits(self.shape) + 8 * self.columns.spec.num_bytes(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of elements."""
        return self.num_bits / max(self.q.codes.numel(), 1)

    @property
    def rounded(self) -> Tensor:
        """Which elements the codes stand for: bool [*shape], False in the columns."""
        return ~self.columns.mask(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The reconstruction: of the codes, with the columns in their places; computed and cast as `dequantize` does."""
        w_hat = dequantize(self.q, dtype)
        return w_hat.index_copy_(self.columns.axis, self.columns.ids.to(torch.int64), self.columns.values.to(dtype))


def split(weight: QTensor | MixedTensor) -> tuple[QTensor, FloatColumns | None]:
    """The codes, and the columns in floating point where there are some."""
    return (weight.q, weight.columns) if isinstance(weight, MixedTensor) else (weight, None)


def take_columns(weight: Tensor, ids: Tensor, stored: torch.dtype) -> tuple[Tensor, FloatColumns]:
    """What is left to be rounded of a weight, with zeros in those columns, and the columns in 16 bits.

    Args:
      weight: float [out_features, in_features]; not changed.
      ids: the columns' numbers: integers [k], k > 0, rising.
      stored: the type that the weight is stored in; columns take it if it has 16 bits. Wider ones become float16, which is the
        more precise of the two, unless one of them is beyond its range: then bfloat16.

    Raises:
      SchemeError: numbers that are none of the weight's columns, or not rising.
      DataError: NaN or infinity.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < weight.shape[1]:
        raise SchemeError(f"columns {int(ids.min())} to {int(ids.max())} are not all in 0 to {weight.shape[1] - 1}")
    columns = weight[:, ids.to(torch.int64)]
    own = [stored] if stored in (torch.float16, torch.bfloat16) else []
    casts = (columns.to(dtype) for dtype in (*own, torch.float16, torch.bfloat16))
    kept = FloatColumns(ids.to(torch.int32), next((c for c in casts if bool(torch.isfinite(c).all())), columns))
    rest = weight.clone()
    rest[:, ids.to(torch.int64)] = 0
    return rest, kept
