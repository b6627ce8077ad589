"""Inputs rounded to 8 bits, one scale a token, and the product of what they became with a weight of 8 bits.

    y[t, r] = x_scale[t] * (scale[r] * sum_k s[t, k] codes[r, k])  +  bias[r]

Integers are summed in INT32, which is exact; then every operation rounds by itself, in the order that is written here: launch
with `enable_fp_fusion=False`, or the compiler makes one rounding of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(
    x,  # float [tokens, columns]
    given,  # float32 [1], the scale of all tokens; not read when `dynamic`
    codes,  # int8, or FP8 e4m3, [tokens, columns]
    scale,  # float32 [tokens]; NaN for a token that holds NaN or infinity
    columns,
    smallest: tl.constexpr,  # the least scale
    low: tl.constexpr,  # the least and the greatest value of a code
    high: tl.constexpr,
    dynamic: tl.constexpr,
    integer: tl.constexpr,
    tile: tl.constexpr,
):
    """One token: its scale, and its columns over that scale, to the nearest value, ties to the even code."""
    token = tl.program_id(0).to(tl.int64)
    greatest = tl.zeros([tile], tl.float32)
    odd = tl.zeros([tile], tl.int32)
    for k in range(0, columns, tile):
        at = k + tl.arange(0, tile)
        size = tl.abs(tl.load(x + token * columns + at, at < columns, 0).to(tl.float32))
        finite = size < float("inf")
        greatest = tl.maximum(greatest, tl.where(finite, size, 0.0))
        odd = tl.where(finite, odd, 1)
    if dynamic:
        step = tl.div_rn(tl.max(greatest, 0), high)
        step = tl.maximum(tl.where(step > 0.0, step, 1.0), smallest)
    else:
        step = tl.load(given)
    tl.store(scale + token, tl.where(tl.max(odd, 0) > 0, float("nan"), step))
    for k in range(0, columns, tile):
        at = k + tl.arange(0, tile)
        value = tl.load(x + token * columns + at, at < columns, 0).to(tl.float32)
        value = tl.div_rn(value, tl.full([tile], 0.0, tl.float32) + step)
        value = tl.minimum(tl.maximum(value, low), high)
        value = whole(value) if integer else e4m3(value)
        tl.store(codes + token * columns + at, value.to(codes.dtype.element_ty), at < columns)


@triton.jit
def whole(value):
    """The nearest integers of float32 below 2**22, half to even: at 1.5 * 2**23 float32 has no fractions, and sums round so."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def e4m3(value):
    """The nearest values of FP8 e4m3, in float32, for values in its range: ties to the even pattern, signs of zeros kept.

    Steps are 2**-3 of the power of two below, which ends at 2**-6. The conversion that follows has nothing left to round:
    Triton's interpreter would lose the carry into the exponent.
    """
    pattern = value.to(tl.uint32, bitcast=True)
    power = (pattern & 0x7F800000).to(tl.float32, bitcast=True)
    quantum = tl.maximum(power, 0.015625) * 0.125
    nearest = whole(tl.div_rn(tl.abs(value), quantum)) * quantum
    return (nearest.to(tl.uint32, bitcast=True) | (pattern & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def product(
    x,  # int8, or FP8 e4m3, [tokens, columns]
    x_scale,  # float32 [tokens]
    codes,  # of x's type [rows, columns]
    scale,  # float [rows]
    bias,  # float [rows]; not read without `has_bias`
    y,  # float [tokens, rows]; with `split`, [splits, tokens, rows] of the sums' type
    tokens,
    rows,
    columns,
    span,  # columns of one split
    sums: tl.constexpr,  # int32 or float32
    has_bias: tl.constexpr,
    split: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """One tile of y, over one split of the columns."""
    tiles = tl.cdiv(tokens, tile_tokens)
    m = tl.program_id(0) % tiles * tile_tokens + tl.arange(0, tile_tokens)
    n = tl.program_id(0) // tiles * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    x_rows = x + m.to(tl.int64)[:, None] * columns
    code_rows = codes + n.to(tl.int64)[None, :] * columns
    total = tl.zeros([tile_tokens, tile_rows], sums)
    for k in range(part * span, min(part * span + span, columns), tile_columns):
        at = k + tl.arange(0, tile_columns)
        a = tl.load(x_rows + at[None, :], (m < tokens)[:, None] & (at < columns)[None, :], 0.0)
        b = tl.load(code_rows + at[:, None], (n < rows)[None, :] & (at < columns)[:, None], 0.0)
        if sums == tl.float32:
            # Hopper's FP8 sums have 14 bits: after each step they go on in float32.
            total = tl.dot(a, b, total, max_num_imprecise_acc=tile_columns)
        else:
            total = tl.dot(a, b, total, out_dtype=sums)
    place = m.to(tl.int64)[:, None] * rows + n[None, :]
    stored = (m < tokens)[:, None] & (n < rows)[None, :]
    if split:
        tl.store(y + part * tokens * rows + place, total, stored)
    else:
        by_token = tl.load(x_scale + m, m < tokens, 0)[:, None]
        by_row = tl.load(scale + n, n < rows, 0).to(tl.float32)[None, :]
        found = total.to(tl.float32) * by_row * by_token
        if has_bias:
            found += tl.load(bias + n, n < rows, 0).to(tl.float32)[None, :]
        tl.store(y + place, found.to(y.dtype.element_ty), stored)


@triton.jit
def finished(
    parts,  # int32 or float32 [splits, tokens, rows]
    x_scale,  # float32 [tokens]
    scale,  # float [rows]
    bias,  # float [rows]; not read without `has_bias`
    y,  # float [tokens, rows]
    size,  # tokens times rows
    rows,
    splits,
    has_bias: tl.constexpr,
    tile: tl.constexpr,
):
    """Parts of sums over columns, in their order, then what `product` does to a sum."""
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = at < size
    total = tl.zeros([tile], parts.dtype.element_ty)
    for part in range(splits):
        total += tl.load(parts + part * size + at, inside, 0)
    found = total.to(tl.float32) * tl.load(scale + at % rows, inside, 0).to(tl.float32)
    found = found * tl.load(x_scale + at // rows, inside, 0)
    if has_bias:
        found += tl.load(bias + at % rows, inside, 0).to(tl.float32)
    tl.store(y + at, found.to(y.dtype.element_ty), inside)
