"""Float inputs, as they are, times a weight of integers or of FP8, on tensor cores.

    y[t, r] = sum_g scale[g, r] * sum_k x[t, k] (codes[r, k] - offset[g, r])  +  bias[r]

codes - offset is an integer of at most 255, and an FP8 value has four significant bits: both are exact in float16 and in
bfloat16, so that x times a weight is exact in float32 and only sums and scales round. Steps in their order, each a dot product
in float32; where columns are split, the parts in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x,  # float16 or bfloat16 [tokens, columns]
    codes,  # uint8 [rows, row_bytes], see `layout`
    scale,  # float [groups, rows]
    offset,  # uint8 [groups, rows]; not read without `has_offsets`
    bias,  # float [rows]; not read without `has_bias`
    y,  # of x's type [tokens, rows]; with `split`, float32 [splits, tokens, rows], without bias
    tokens,
    rows,
    columns,
    row_bytes,
    span,  # columns of one split
    group_size: tl.constexpr,  # a multiple of tile_columns; 0: one scale a row
    bits: tl.constexpr,  # 4: two codes a byte; 8
    float8: tl.constexpr,  # codes are bit patterns of e4m3
    constant: tl.constexpr,  # the offset, without `has_offsets`
    has_offsets: tl.constexpr,
    has_bias: tl.constexpr,
    split: tl.constexpr,
    upcast: tl.constexpr,  # multiply in float32: Triton's interpreter multiplies the bit patterns of bfloat16
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
    code_rows = codes + n.to(tl.int64)[None, :] * row_bytes
    inside = n < rows
    shift = tl.full([tile_rows], constant, tl.int16)
    if has_offsets and group_size == 0:
        shift = tl.load(offset + n, inside, 0).to(tl.int16)
    total = tl.zeros([tile_tokens, tile_rows], tl.float32)
    for k in range(part * span, min(part * span + span, columns), tile_columns):
        if has_offsets and group_size > 0:
            shift = tl.load(offset + k // group_size * rows + n, inside, 0).to(tl.int16)
        if bits == 4:
            found = pairs(x_rows, code_rows, m, n, k, shift, tokens, rows, columns, row_bytes, upcast, tile_columns)
        else:
            found = singles(x_rows, code_rows, m, n, k, shift, tokens, rows, columns, float8, upcast, tile_columns)
        if group_size > 0:
            step = tl.load(scale + k // group_size * rows + n, inside, 0).to(tl.float32)
            total += found * step[None, :]
        else:
            total += found
    if group_size == 0:
        total *= tl.load(scale + n, inside, 0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * rows + n[None, :]
    stored = (m < tokens)[:, None] & inside[None, :]
    if split:
        tl.store(y + part * tokens * rows + place, total, stored)
    else:
        if has_bias:
            total += tl.load(bias + n, inside, 0).to(tl.float32)[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), stored)


@triton.jit
def pairs(
    x_rows,
    code_rows,
    m,
    n,
    k,
    shift,
    tokens,
    rows,
    columns,
    row_bytes,
    upcast: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """A step over codes that lie two to a byte, 16 columns apart, hence as two products of half the columns."""
    i = tl.arange(0, tile_columns // 2)
    low = k + i // 16 * 32 + i % 16
    byte = k // 2 + i
    both = tl.load(code_rows + byte[:, None], (n < rows)[None, :] & (byte < row_bytes)[:, None], 0)
    a = inputs(x_rows, m, low, tokens, columns, upcast)
    b = inputs(x_rows, m, low + 16, tokens, columns, upcast)
    found = tl.dot(a, integers(both & 15, shift).to(a.dtype), input_precision="ieee")
    return tl.dot(b, integers(both >> 4, shift).to(b.dtype), found, input_precision="ieee")


@triton.jit
def singles(
    x_rows,
    code_rows,
    m,
    n,
    k,
    shift,
    tokens,
    rows,
    columns,
    float8: tl.constexpr,
    upcast: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """A step over codes that lie one to a byte."""
    at = k + tl.arange(0, tile_columns)
    codes = tl.load(code_rows + at[:, None], (n < rows)[None, :] & (at < columns)[:, None], 0)
    a = inputs(x_rows, m, at, tokens, columns, upcast)
    values = e4m3(codes) if float8 else integers(codes, shift)
    return tl.dot(a, values.to(a.dtype), input_precision="ieee")


@triton.jit
def inputs(x_rows, m, k, tokens, columns, upcast: tl.constexpr):
    """A tile of x, zeros outside, NaN for infinity: a token that holds either gives NaN for every output."""
    tile = tl.load(x_rows + k[None, :], (m < tokens)[:, None] & (k < columns)[None, :], 0)
    wide = tile.to(tl.float32)
    wide = tl.where(tl.abs(wide) < float("inf"), wide, float("nan"))
    return wide if upcast else wide.to(tile.dtype)


@triton.jit
def integers(stored, shift):
    """Unsigned codes [columns, rows] less the offset of their row."""
    return stored.to(tl.int16) - shift[None, :]


@triton.jit
def e4m3(pattern):
    """What FP8 bit patterns stand for, in float16, exactly.

    s eeee mmm in the places of float16's s 0eeee mmm0000000 is a number 2**8 too small, subnormals too. Plain integer
    instructions do it, so that devices without FP8 read such weights as well.
    """
    wide = pattern.to(tl.uint16)
    half = ((wide & 0x7F) << 7 | (wide & 0x80) << 8).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half)


@triton.jit
def added(
    parts,  # float32 [splits, size]
    bias,  # float [rows]; not read without `has_bias`
    y,  # float [size]
    size,  # tokens times rows
    rows,
    splits,
    has_bias: tl.constexpr,
    tile: tl.constexpr,
):
    """Parts of sums over columns, in their order, then the bias, then one rounding."""
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = at < size
    total = tl.zeros([tile], tl.float32)
    for part in range(splits):
        total += tl.load(parts + part * size + at, inside, 0)
    if has_bias:
        total += tl.load(bias + at % rows, inside, 0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), inside)
