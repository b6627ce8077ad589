"""A weight as it is stored, and the matrices [out_features, in_features] that it holds.

A linear is one matrix; some models store it transposed, [in, out]; a stack [experts, out, in] or [experts, in, out] holds one
for each expert. Methods see matrices only; this goes from the stored scheme to theirs, and back from their codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.tensor.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, scale_shape
from halfbin.tensor.qtensor import QTensor
from halfbin.tensor.scheme import Scheme


def matrices(weight: Tensor, *, transposed: bool) -> list[Tensor]:
    """Views of a stored weight, each [out_features, in_features].

    Args:
      weight: two dimensions, or three for a stack.
      transposed: stored [..., in_features, out_features].
    """
    stack = weight if weight.ndim == 3 else weight[None]
    return [matrix.T if transposed else matrix for matrix in stack]


def scheme_of_matrix(scheme: Scheme, num_dims: int, *, transposed: bool) -> Scheme:
    """The scheme of each matrix when the whole is stored with `scheme`.

    Raises:
      SchemeError: one scale reaches over several matrices.
    """
    return replace(scheme, granularity=_of_matrix(scheme.granularity, num_dims, transposed))


def _of_matrix(granularity: Granularity, num_dims: int, transposed: bool) -> Granularity:
    match granularity:
        case PerTensor() if num_dims == 2:
            return granularity
        case PerToken():
            return PerChannel(1 if transposed else 0)
        case PerChannel(axis) if num_dims == 2:
            return PerChannel(1 - axis if transposed else axis)
        case PerGroup(size, axis):
            along_columns = axis in (-1, num_dims - 1)
            if axis not in (-1, num_dims - 1, num_dims - 2):
                raise SchemeError(f"granularity {granularity} groups weights of several matrices of a stack")
            return PerGroup(size) if along_columns != transposed else PerGroup(size, axis=0)
        case PerBlock(rows, columns):
            return PerBlock(columns, rows) if transposed else granularity
        case _:
            raise SchemeError(f"granularity {granularity} shares scales between the matrices of a stack; use channel")


def as_stored(quantized: Sequence[QTensor], scheme: Scheme, shape: tuple[int, ...], *, transposed: bool) -> QTensor:
    """Matrices that were quantized one by one, as the one weight of `shape` and `scheme` that they are stored in."""
    codes = _joined([q.codes for q in quantized], shape, transposed)
    scales = scale_shape(shape, scheme.granularity)
    scale = _joined([q.scale for q in quantized], scales, transposed)
    zero_points = [q.zero_point for q in quantized if q.zero_point is not None]
    zero_point = _joined(zero_points, scales, transposed) if zero_points else None
    return QTensor(codes, scale, zero_point, scheme)


def _joined(parts: Sequence[Tensor], shape: tuple[int, ...], transposed: bool) -> Tensor:
    turned = [part.T if transposed else part for part in parts]
    joined = torch.stack(turned) if len(shape) == 3 else turned[0]
    return joined.reshape(shape).contiguous()
