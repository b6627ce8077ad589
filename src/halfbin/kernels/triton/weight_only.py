"""Float inputs, as they are, times a quantized weight: the host's side of `device.weight_only`.

Within a bound of the exact product that tests/kernels/triton holds: with S = sum |x| |w_hat| + |bias| and u = 2**-24,
(columns + 2 groups + splits + 3) roundings of sums, and one to the type of y. Tensor cores may drop bits that they would round:
u = 2**-23 there.

The same inputs give the same bits on every GPU of a kind and at every run: nothing is added in an order of chance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halfbin.kernels.triton.layout import Weight
from halfbin.kernels.triton.machine import interpreted, on_the_device_of_x, stored_as
from halfbin.kernels.triton.tiles import cut

INPUT_TYPES = (torch.float16, torch.bfloat16)
ADDED = 1024  # outputs that one program of the second pass adds up


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ w_hat.T + bias for x float16 or bfloat16 [..., columns]: x.dtype [..., rows].

    A token that holds NaN or infinity gets NaN for all its outputs, as by `kernels.products`.

    Args:
      bias: float [rows].
    """
    found: Tensor = _operator(
        x,
        weight.codes,
        weight.scale,
        weight.offset,
        bias,
        weight.group_size,
        weight.bits,
        weight.float8,
        weight.constant,
    )
    return found


@on_the_device_of_x
def _multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
    float8: bool,
    constant: int,
) -> Tensor:
    from halfbin.kernels.triton.device.weight_only import added, product

    x = x.contiguous()
    columns, rows = x.shape[-1], codes.shape[0]
    added_last = x if bias is None else bias.contiguous()
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], rows), dtype=stored_as(x.dtype))
    if not y.numel():
        return y.to(x.dtype)
    way = cut(tokens, rows, columns, group_size)
    tile, split = way.tile, way.splits > 1
    parts = x.new_empty((way.splits, tokens, rows), dtype=torch.float32) if split else y
    product[-(-tokens // tile.tokens) * -(-rows // tile.rows), way.splits](
        x,
        codes,
        scale,
        codes if offset is None else offset,
        added_last,
        parts,
        tokens,
        rows,
        columns,
        codes.shape[1],
        way.span,
        group_size=0 if group_size >= columns else group_size,
        bits=bits,
        float8=float8,
        constant=constant,
        has_offsets=offset is not None,
        has_bias=bias is not None and not split,
        split=split,
        upcast=interpreted() and x.dtype is torch.bfloat16,
        tile_tokens=tile.tokens,
        tile_rows=tile.rows,
        tile_columns=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        added[(-(-y.numel() // ADDED),)](
            parts, added_last, y, y.numel(), rows, way.splits, has_bias=bias is not None, tile=ADDED
        )
    return y.to(x.dtype)


_torch_library: Any = torch.library  # it has no types
_library = _torch_library.Library("halfbin", "FRAGMENT")
_library.define(
    "triton_weight_only(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor? bias, int group_size, int bits, "
    "bool float8, int constant) -> Tensor"
)
_library.impl("triton_weight_only", _multiply, "CompositeExplicitAutograd")


def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_torch_library.register_fake("halfbin::triton_weight_only", _shape, lib=_library)
_operator = torch.ops.halfbin.triton_weight_only.default
