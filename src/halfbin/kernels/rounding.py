"""Round to nearest, where the elements that share a scale are runs of a row: compiled, or in pieces that stay in the cache.

The plain code in `numerics` makes a pass over main memory for every step: is it finite, least, greatest, divide, round,
clip, convert. The compiled loops (`csrc/rounding/`) take some groups through all steps in the nearest cache. In pieces, for
machines they were not written for, torch takes some rows through all steps before the next ones are touched, in one buffer. So
the weights are read once and the codes written once. The arithmetic of an element is the same operation for operation, hence
the same bits, whatever the piece, the instruction set and the number of threads.

    x           [num_rows, n]       bfloat16, float16 or float32, contiguous rows
    scale       [num_rows, tiles]   tiles = ceil(n / size): the last tile of a row may be shorter
    zero_point  [num_rows, tiles]   integers, or None for 0
    codes       [num_rows, n]

Large tensors are worked on by `torch.get_num_threads()` threads; see `threads.py` for why they are not torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.kernels import instruction_sets
from halfbin.kernels._native import CodeFormat, Covers, ScaleRule, ScaleType, fit_and_round, round_with, search_ranges
from halfbin.kernels.threads import in_threads

# Elements of a piece: 2 MiB of float32. Every torch call costs about 5 us, so smaller pieces lose more to calls than they
# gain from a nearer cache: on one thread of a 1 MiB L2, 32 MiB L3 machine, 128 Ki take 1.5 to 1.9 times as long, 4 Mi 2.6.
PIECE = 1 << 19


def refuses(x: Tensor) -> str | None:
    """Why these loops cannot take `x`, in words; None: they can."""
    if x.device.type != "cpu":
        return f"the pieces are cut for a CPU's cache, and the tensor is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the arithmetic is float32, and the tensor is {x.dtype}"
    if x.ndim != 2 or not x.is_contiguous():
        return f"rows must lie one behind the other, and the tensor is {list(x.shape)} with strides {list(x.stride())}"
    return None if x.numel() else f"the tensor has no elements: {list(x.shape)}"


def compiled() -> bool:
    """Whether the compiled loops run here: they read and write numbers as little-endian machines hold them."""
    return sys.byteorder == "little"


SCALE_TYPES = {
    torch.float32: ScaleType.FLOAT32,
    torch.float16: ScaleType.FLOAT16,
    torch.bfloat16: ScaleType.BFLOAT16,
    torch.float8_e8m0fnu: ScaleType.E8M0,
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How scales and zero points follow from the range of a tile.

    params:      from the least and the greatest element of tiles, float32 of any shape, to their scales and zero points.
    covers:      what a scale covers, and
    divisor:     the steps that it is divided into: the same rule, for the compiled loops.
    scale_dtype: what scales are stored as.
    """

    params: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
    covers: Covers
    divisor: float
    scale_dtype: torch.dtype

    @property
    def rule(self) -> ScaleRule:
        """As the compiled loops take it."""
        return ScaleRule(self.covers, self.divisor, SCALE_TYPES[self.scale_dtype])


@dataclass(frozen=True, slots=True)
class Encoder:
    """How elements in steps, x / scale, become codes."""

    dtype: torch.dtype
    encode: Callable[[Tensor, Tensor | None], Tensor]
    """Steps, float32 [rows, tiles, size], changed at will, and zero points [rows, tiles, 1]; to codes, perhaps as floats."""
    format: CodeFormat
    """The same for the compiled loops."""


def to_integers(qmin: int, qmax: int, dtype: torch.dtype) -> Encoder:
    """clip(round(steps) + zero_point, qmin, qmax), half to even, as int8 or uint8."""

    def encode(steps: Tensor, zeros: Tensor | None) -> Tensor:
        steps.round_()
        if zeros is not None:
            steps.add_(zeros)
        return steps.clamp_(qmin, qmax)

    return Encoder(dtype, encode, CodeFormat.integers(qmin, qmax))


def to_floats(
    encode: Callable[[Tensor], Tensor],
    *,
    exponent_bits: int,
    mantissa_bits: int,
    bias: int,
    largest: float,
    values: Sequence[float],
) -> Encoder:
    """Bit patterns of small floats, half to even, clipped to the largest one, as uint8.

    Args:
      encode: float32 of any shape to bit patterns.
      exponent_bits, mantissa_bits, bias: of the format, which has subnormals, and a sign above both fields.
      largest: its largest finite value.
      values: the value of each bit pattern.
    """
    fmt = CodeFormat.floats(exponent_bits, mantissa_bits, bias, largest, list(values))
    return Encoder(torch.uint8, lambda steps, zeros: encode(steps), fmt)


def to_table(boundaries: Tensor, values: Sequence[float]) -> Encoder:
    """How many `boundaries`, float32 and rising, lie below the steps: the index of the nearest of `values`, as uint8."""
    edges = boundaries.tolist()

    def encode(steps: Tensor, zeros: Tensor | None) -> Tensor:
        # A comparison for each boundary, vectorised, takes a tenth of the time of torch.bucketize's search.
        codes = torch.zeros(steps.shape, dtype=torch.uint8)
        above = torch.empty(steps.shape, dtype=torch.bool)
        for edge in edges:
            codes.add_(torch.gt(steps, edge, out=above).view(torch.uint8))
        return codes

    return Encoder(torch.uint8, encode, CodeFormat.table(edges, list(values)))


def num_tiles(x: Tensor, size: int) -> int:
    """Of each row."""
    return int(-(-x.shape[1] // size))


def round_rows(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    size: int,
    encoder: Encoder,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Codes of finite `x` under given scales > 0 of any float type.

    `instruction_set` names a compiled form; by default the best one, or pieces where there is none.
    """
    if instruction_set is None and not compiled():
        return round_rows_in_pieces(x, scale, zero_point, size, encoder)
    codes = torch.empty(x.shape, dtype=encoder.dtype)
    round_with(
        instruction_set or instruction_sets.best(),
        x.detach(),
        size,
        encoder.format,
        scale.detach().to(torch.float32).contiguous(),
        None if zero_point is None else zero_point.to(torch.int32).contiguous(),
        codes.view(torch.uint8),
        torch.get_num_threads(),
    )
    return codes


def fit_and_round_rows(
    x: Tensor, size: int, fit: Fit, encoder: Encoder, *, instruction_set: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes, scales of the type they are stored as, and zero points, int32, that `fit` gives for the range of every tile.

    None when an element is NaN or infinite. `instruction_set` as above.
    """
    if instruction_set is None and not compiled():
        return fit_and_round_rows_in_pieces(x, size, fit, encoder)
    shape = (x.shape[0], num_tiles(x, size))
    codes = torch.empty(x.shape, dtype=encoder.dtype)
    scale = torch.empty(shape, dtype=fit.scale_dtype)
    zero_point = torch.empty(shape, dtype=torch.int32) if fit.covers == Covers.RANGE else None
    finite = fit_and_round(
        instruction_set or instruction_sets.best(),
        x.detach(),
        size,
        encoder.format,
        fit.rule,
        codes.view(torch.uint8),
        scale.view(torch.uint8),
        zero_point,
        torch.get_num_threads(),
    )
    return (codes, scale, zero_point) if finite else None


def search_rows(
    x: Tensor,
    size: int,
    fit: Fit,
    encoder: Encoder,
    factors: Sequence[float],
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The range of each tile with the least squared error among its whole range and shrunken ones, float32 [num_rows, tiles].

    Both ends shrink together; where zero points are fitted, then the low end and then the high end on their own, each from the
    best so far. The first of equals wins. None when an element is NaN or infinite, or nothing is compiled for this machine.
    """
    if instruction_set is None and not compiled():
        return None
    least, greatest = torch.empty(2, x.shape[0], num_tiles(x, size))
    finite = search_ranges(
        instruction_set or instruction_sets.best(),
        x.detach(),
        size,
        encoder.format,
        fit.rule,
        list(factors),
        least,
        greatest,
        torch.get_num_threads(),
    )
    return (least, greatest) if finite else None


def round_rows_in_pieces(x: Tensor, scale: Tensor, zero_point: Tensor | None, size: int, encoder: Encoder) -> Tensor:
    """`round_rows` by torch."""
    scale = scale.detach().to(torch.float32)
    codes = torch.empty(x.shape, dtype=encoder.dtype)

    def work(piece: Piece, numbers: Tensor) -> None:
        zeros = None if zero_point is None else zero_point[piece.rows, piece.tiles, None]
        _encode(codes, piece, numbers, scale[piece.rows, piece.tiles, None], zeros, encoder)

    for_each_piece(x.detach(), size, work)
    return codes


def fit_and_round_rows_in_pieces(
    x: Tensor, size: int, fit: Fit, encoder: Encoder
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`fit_and_round_rows` by torch."""
    shape = (x.shape[0], num_tiles(x, size))
    codes = torch.empty(x.shape, dtype=encoder.dtype)
    scale = torch.empty(shape, dtype=fit.scale_dtype)
    zero_point = torch.zeros(shape, dtype=torch.int32)
    odd: list[Piece] = []  # with elements that are not finite
    without: list[Piece] = []  # without zero points

    def work(piece: Piece, numbers: Tensor) -> None:
        least, greatest = torch.amin(numbers, 2, keepdim=True), torch.amax(numbers, 2, keepdim=True)
        # A NaN makes both NaN, and an infinity one of them infinite.
        if odd or not bool((torch.isfinite(least) & torch.isfinite(greatest)).all()):
            odd.append(piece)
            return
        scales, zeros = fit.params(least, greatest)
        scale[piece.rows, piece.tiles] = scales.squeeze(2)
        if zeros is None:
            without.append(piece)
        else:
            zero_point[piece.rows, piece.tiles] = zeros.squeeze(2)
        _encode(codes, piece, numbers, scales.to(torch.float32), zeros, encoder)

    for_each_piece(x.detach(), size, work)
    return None if odd else (codes, scale, None if without else zero_point)


def _encode(
    codes: Tensor, piece: Piece, numbers: Tensor, scale: Tensor, zeros: Tensor | None, encoder: Encoder
) -> None:
    # A division, not a product with the inverse: that would move some ties and some neighbours of ties.
    steps = encoder.encode(numbers.div_(scale), zeros)
    codes[piece.rows, piece.columns].copy_(steps.flatten(1))


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows, and whole tiles of one size in them."""

    rows: slice
    columns: slice
    tiles: slice
    size: int

    @property
    def numel(self) -> int:
        """How many elements it holds."""
        return len(range(self.rows.start, self.rows.stop)) * len(range(self.columns.start, self.columns.stop))


def for_each_piece(x: Tensor, size: int, work: Callable[[Piece, Tensor], None]) -> None:
    """Cut `x`, shaped as above, and call `work`, from several threads, with each piece and its elements.

    The elements are float32 [rows, tiles, size], in a buffer that is the piece's own until `work` returns.
    """
    pieces = list(_cut(x.shape[0], x.shape[1], size, PIECE))

    def share(some: Sequence[Piece]) -> None:
        buffer = torch.empty(max(piece.numel for piece in some))
        for piece in some:
            part = x[piece.rows, piece.columns]
            numbers = buffer[: piece.numel].view(part.shape).copy_(part)
            work(piece, numbers.view(numbers.shape[0], -1, piece.size))

    in_threads(pieces, share)


def _cut(num_rows: int, n: int, size: int, numel: int) -> Iterator[Piece]:
    """Pieces of about `numel` elements: first those of whole tiles, then those of the rows' shorter last tiles."""
    size = min(size, n)
    whole = n - n % size
    for start, stop, length in ((0, whole, size), (whole, n, n - whole)):
        width = max(length, min(stop - start, numel // max(length, 1) * length))
        for left in range(start, stop, max(width, 1)):
            right = min(left + width, stop)
            height = max(1, numel // (right - left))
            for top in range(0, num_rows, height):
                yield Piece(
                    rows=slice(top, min(top + height, num_rows)),
                    columns=slice(left, right),
                    tiles=slice(left // size, left // size + (right - left) // length),
                    size=length,
                )
