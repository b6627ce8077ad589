"""Inputs that are rounded to INT8 or FP8 times a weight of the same: the host's side of `device.quantized_inputs`.

INT8: every sum is exact, and what follows has the order of `tensor.int_matmul`: the same bits. FP8: sums in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels.triton.machine import on_the_device_of_x, stored_as
from halfbin.kernels.triton.tiles import cut

INPUT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST = torch.finfo(torch.float32).smallest_normal
FLOAT8_MAX = 448.0
ROUNDED = 1024  # columns that one program rounds at once
FINISHED = 1024  # outputs that one program of the second pass makes


@dataclass(frozen=True, slots=True)
class Range:
    """What inputs are rounded to: int8 codes from `low` to `high`, or FP8 e4m3."""

    low: int = -128
    high: int = 127
    float8: bool = False

    def __post_init__(self) -> None:
        if not self.float8 and not -128 <= self.low <= 0 < self.high <= 127:
            raise ValueError(f"codes {self.low} to {self.high} must hold 0 and fit int8")


def linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, to: Range, x_scale: Tensor | None = None
) -> Tensor:
    """x_hat @ w_hat.T + bias for x float32, float16 or bfloat16 [..., columns]: x.dtype [..., rows].

    Args:
      codes: int8, or bit patterns of FP8 e4m3 as uint8, [rows, columns].
      scale: float [rows].
      bias: float [rows].
      to: what inputs are rounded to.
      x_scale: float32 [1], for static inputs; otherwise each token has its own, the largest |x| over the largest code.

    Raises:
      DataError: NaN or infinity in `x`. To know, the host waits for the device.
    """
    found: Tensor = _operator(x, codes, scale, bias, to.low, to.high, to.float8, x_scale)
    return found


@on_the_device_of_x
def quantize(x: Tensor, to: Range, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes, int8 or float8_e4m3fn [tokens, columns], and float32 scales [tokens] of contiguous x [tokens, columns].

    A token that holds NaN or infinity has a scale of NaN, and codes that mean nothing.
    """
    from halfbin.kernels.triton.device.quantized_inputs import rounded

    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if to.float8 else torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    low, high = (-FLOAT8_MAX, FLOAT8_MAX) if to.float8 else (float(to.low), float(to.high))
    rounded[(len(x),)](
        x,
        scale if x_scale is None else x_scale,
        codes,
        scale,
        x.shape[1],
        smallest=SMALLEST,
        low=low,
        high=high,
        dynamic=x_scale is None,
        integer=not to.float8,
        tile=ROUNDED,
        enable_fp_fusion=False,
    )
    return codes, scale


@on_the_device_of_x
def _multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low: int,
    high: int,
    float8: bool,
    x_scale: Tensor | None,
) -> Tensor:
    import triton.language as tl

    from halfbin.kernels.triton.device.quantized_inputs import finished, product

    columns, rows = x.shape[-1], codes.shape[0]
    added_last = x if bias is None else bias.contiguous()
    tokens = math.prod(x.shape[:-1])
    y = x.new_empty((*x.shape[:-1], rows), dtype=stored_as(x.dtype))
    if not y.numel():
        return y.to(x.dtype)
    s, s_scale = quantize(x.contiguous().view(tokens, columns), Range(low, high, float8), x_scale)
    way = cut(tokens, rows, columns, columns)
    tile, split = way.tile, way.splits > 1
    sums = torch.float32 if float8 else torch.int32
    parts = x.new_empty((way.splits, tokens, rows), dtype=sums) if split else y
    product[-(-tokens // tile.tokens) * -(-rows // tile.rows), way.splits](
        s,
        s_scale,
        codes.view(s.dtype),
        scale,
        added_last,
        parts,
        tokens,
        rows,
        columns,
        way.span,
        sums=tl.float32 if float8 else tl.int32,
        has_bias=bias is not None,
        split=split,
        tile_tokens=tile.tokens,
        tile_rows=tile.rows,
        tile_columns=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if split:
        finished[(-(-y.numel() // FINISHED),)](
            parts,
            s_scale,
            scale,
            added_last,
            y,
            y.numel(),
            rows,
            way.splits,
            has_bias=bias is not None,
            tile=FINISHED,
            enable_fp_fusion=False,
        )
    if odd := int(s_scale.isnan().sum()):
        raise DataError(
            f"{odd} of {tokens} tokens hold NaN or infinity, and no scale could be right for them; look at the "
            "layer before this one"
        )
    return y.to(x.dtype)


_torch_library: Any = torch.library  # it has no types
_library = _torch_library.Library("halfbin", "FRAGMENT")
_library.define(
    "triton_quantized_inputs(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int low, int high, bool float8, "
    "Tensor? x_scale) -> Tensor"
)
_library.impl("triton_quantized_inputs", _multiply, "CompositeExplicitAutograd")


def _shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_torch_library.register_fake("halfbin::triton_quantized_inputs", _shape, lib=_library)
_operator = torch.ops.halfbin.triton_quantized_inputs.default
