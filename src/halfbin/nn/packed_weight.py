"""A weight in the layout of a compiled product, and how scales of tiles become those of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import products
from halfbin.tensor import QTensor, Scheme


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """Everything that a `QTensor` holds, in `memory` alone: a module may let go of the codes."""

    memory: Tensor
    out_features: int

    def unpack(self, scheme: Scheme) -> QTensor:
        """The `QTensor` of this scheme that was packed, bit for bit."""
        raise NotImplementedError


def by_row(params: Tensor, q: QTensor, groups: int = 1) -> Tensor:
    """A scale or zero point for each row and group, from those of taller tiles, or of tiles as wide as `groups` of them."""
    rows, _ = q.shape
    tall = q.scheme.granularity.tile(q.shape)[0]
    spread = params.repeat_interleave(tall, 0)[:rows] if 1 < tall < rows else params
    return spread.expand(rows, spread.shape[1] if spread.shape[1] > 1 else groups)


def by_tile(params: Tensor, codes: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `by_row`: one of each tile's own."""
    tall, wide = scheme.granularity.tile(tuple(codes.shape))
    return params[::tall, : 1 if wide >= codes.shape[1] else None].contiguous()


def readable(bias: Tensor | None) -> Tensor | None:
    """Float16 biases as float32, and values that lie in steps side by side; what the kernels read stays as it is."""
    if bias is None:
        return None
    return (bias if bias.dtype in products.INPUT_TYPES else bias.to(torch.float32)).contiguous()
