"""Which elements share one scale. Every granularity is a tile shape: elements in the same tile share.

For a tensor of shape S and tiles of shape T the scales have shape ceil(S / T), one dimension for each of S's. The last
tile along a dimension may be shorter than the others; nothing is padded and nothing is dropped.

    granularity          tile of a [4096, 300] weight     shape of its scales
    PerTensor()          [4096, 300]                      [1, 1]
    PerChannel(axis=0)   [1, 300]                         [4096, 1]
    PerToken()           [1, 300]                         [4096, 1]
    PerGroup(128)        [1, 128]                         [4096, 3]: 128, 128 and 44 columns
    PerBlock(128, 128)   [128, 128]                       [32, 3]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from halfbin.errors import SchemeError


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for everything."""

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tile in a tensor of `shape`."""
        return shape

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each index along `axis`, the axis that is kept; 0 is out_features of a weight."""

    axis: int = 0

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tile in a tensor of `shape`."""
        axis = _existing(self.axis, shape, self)
        return tuple(1 if i == axis else n for i, n in enumerate(shape))

    def __str__(self) -> str:
        return "channel" if self.axis == 0 else f"channel@{self.axis}"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale for each vector along the last axis: each token of an activation, each row of every matrix of a stack."""

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tile in a tensor of `shape`."""
        _at_least(1, shape, self)
        return (*(1 for _ in shape[:-1]), shape[-1])

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for every `size` neighbouring elements along `axis`: the last one, in_features of a weight.

    Weights that are stored transposed, [in_features, out_features], have their groups along axis 0 (`g128@0`).
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SchemeError(f"group_size={self.size} must be at least 1; one scale a row is spelled channel")

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tile in a tensor of `shape`."""
        axis = _existing(self.axis, shape, self)
        return tuple(self.size if i == axis else 1 for i in range(len(shape)))

    def __str__(self) -> str:
        return f"g{self.size}" if self.axis == -1 else f"g{self.size}@{self.axis}"


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale for every block of `rows` x `columns` of the last two axes."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise SchemeError(f"a block of {self.rows} x {self.columns} holds nothing; both must be at least 1")

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one tile in a tensor of `shape`."""
        _at_least(2, shape, self)
        return (*(1 for _ in shape[:-2]), self.rows, self.columns)

    def __str__(self) -> str:
        return f"b{self.rows}x{self.columns}"


Granularity: TypeAlias = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


def _at_least(num_dims: int, shape: tuple[int, ...], granularity: Granularity) -> None:
    if len(shape) < num_dims:
        raise SchemeError(f"granularity {granularity} needs {num_dims} dimensions or more, got shape {list(shape)}")


def _existing(axis: int, shape: tuple[int, ...], granularity: Granularity) -> int:
    if not -len(shape) <= axis < len(shape):
        raise SchemeError(f"granularity {granularity}: axis {axis} does not exist in a tensor of shape {list(shape)}")
    return axis % len(shape)


def transposed(granularity: Granularity) -> Granularity:
    """The granularity that shares the same weights' scales when a matrix is stored transposed, [in, out]."""
    match granularity:
        case PerChannel(axis):
            return PerChannel(1 - axis)
        case PerGroup(size, -1):
            return PerGroup(size, axis=0)
        case PerBlock(rows, columns):
            return PerBlock(columns, rows)
        case PerToken():
            return PerChannel(1)
        case _:
            return granularity


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`; a dimension without elements has no scales."""
    return tuple(-(-n // max(t, 1)) for n, t in zip(shape, granularity.tile(shape), strict=True))


def spread(params: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """One value per tile, shaped `scale_shape`, to something that broadcasts against a tensor of `shape`."""
    for axis, (n, t) in enumerate(zip(shape, granularity.tile(shape), strict=True)):
        if 1 < t < n:
            params = params.repeat_interleave(t, dim=axis).narrow(axis, 0, n)
    return params


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor that is cut into whole tiles of one shape."""

    elements: tuple[slice, ...]  # where it lies in the tensor
    tiles: tuple[slice, ...]  # where its tiles' scales lie among all scales
    tile: tuple[int, ...]

    def rows(self, x: Tensor) -> Tensor:
        """The region's elements, one tile a row: [number of tiles, elements in a tile]."""
        part = x[self.elements]
        split = [length for n, t in zip(part.shape, self.tile, strict=True) for length in (n // t, t)]
        counts_first = [*range(0, len(split), 2), *range(1, len(split), 2)]
        size = 1
        for t in self.tile:
            size *= t
        return part.reshape(split).permute(counts_first).reshape(-1, size)


def regions(shape: tuple[int, ...], granularity: Granularity) -> Iterator[Region]:
    """The tensor's regions: the one of whole tiles, then those along its edges whose last tile is shorter."""
    spans = []
    for n, t in zip(shape, granularity.tile(shape), strict=True):
        whole = n // t if t else 0
        axis = [(slice(0, whole * t), slice(0, whole), t)] if whole else []
        if t and n % t:
            axis.append((slice(whole * t, n), slice(whole, whole + 1), n % t))
        spans.append(axis)
    for combination in itertools.product(*spans):
        yield Region(
            elements=tuple(part[0] for part in combination),
            tiles=tuple(part[1] for part in combination),
            tile=tuple(part[2] for part in combination),
        )
