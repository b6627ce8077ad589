"""Round to nearest in pieces that stay in the cache, where the elements that share a scale are runs of a row.

The plain code in `numerics` makes a pass over main memory for every step: is it finite, least, greatest, divide, round,
clip, convert. Here a piece of some rows is taken through all steps before the next one is touched, in one buffer, so
that the weights are read twice and the codes written once. The arithmetic of an element is the same operation for
operation, hence the same bits, whatever the piece and the number of threads.

    x      [num_rows, n]       bfloat16, float16 or float32, contiguous rows
    scale  [num_rows, tiles]   tiles = ceil(n / size): the last tile of a row may be shorter

Large tensors are worked on by `torch.get_num_threads()` threads; see `threads.py` for why they are not torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of every tile: float32 [num_rows, tiles] each.

    A NaN makes both NaN and an infinity one of them infinite: to look at these is to look at all of `x`.
    """
    x = x.detach()
    shape = (x.shape[0], -(-x.shape[1] // size))
    minimum, maximum = torch.empty(shape), torch.empty(shape)

    def look(piece: Piece, numbers: Tensor) -> None:
        torch.amin(numbers, 2, out=minimum[piece.rows, piece.tiles])
        torch.amax(numbers, 2, out=maximum[piece.rows, piece.tiles])

    for_each_piece(x, size, look)
    return minimum, maximum


def round_to_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, size: int, *, qmin: int, qmax: int
) -> Tensor:
    """clip(round(x / scale) + zero_point, qmin, qmax), half to even.

    Args:
      x: finite, shaped as above.
      scale: float32 > 0.
      zero_point: integers shaped like scale, or None for 0.
      size: elements in a tile.
      qmin: smallest code; below 0 the codes are int8, else uint8.
      qmax: largest code.

    Returns:
      int8 or uint8 [num_rows, n].
    """
    zeros = None if zero_point is None else zero_point.detach().to(torch.float32)

    def encode(piece: Piece, steps: Tensor) -> Tensor:
        steps.round_()
        if zeros is not None:
            steps.add_(zeros[piece.rows, piece.tiles, None])
        return steps.clamp_(qmin, qmax)

    return _encoded(x, scale, size, torch.int8 if qmin < 0 else torch.uint8, encode)


def round_to_fp8_e4m3(x: Tensor, scale: Tensor, size: int) -> Tensor:
    """Bit patterns of x / scale in OFP8 e4m3, half to even, beyond 448 clipped to it: uint8 [num_rows, n].

    torch's own cast does the rounding; it makes NaN of what lies far outside, hence the clipping before.
    """
    codes = _encoded(x, scale, size, torch.float8_e4m3fn, lambda piece, steps: steps.clamp_(-448.0, 448.0))
    return codes.view(torch.uint8)


def round_to_table(x: Tensor, scale: Tensor, size: int, boundaries: Tensor) -> Tensor:
    """How many `boundaries` lie below x / scale: uint8 [num_rows, n], the index of the nearest value in a table.

    Args:
      x: finite, shaped as above.
      scale: float32 > 0.
      size: elements in a tile.
      boundaries: float32, rising, one between each two neighbours of the table. x / scale on a boundary is below it.
    """
    edges = boundaries.tolist()

    def encode(piece: Piece, steps: Tensor) -> Tensor:
        # A comparison for each boundary, vectorised, takes a tenth of the time of torch.bucketize's search.
        codes = torch.zeros(steps.shape, dtype=torch.uint8)
        above = torch.empty(steps.shape, dtype=torch.bool)
        for edge in edges:
            codes.add_(torch.gt(steps, edge, out=above).view(torch.uint8))
        return codes

    return _encoded(x, scale, size, torch.uint8, encode)


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


def _encoded(
    x: Tensor, scale: Tensor, size: int, dtype: torch.dtype, encode: Callable[[Piece, Tensor], Tensor]
) -> Tensor:
    """Codes [num_rows, n] of `dtype`: `encode` turns a piece's x / scale, [rows, tiles, size], into them."""
    x, scale = x.detach(), scale.detach()
    codes = torch.empty(x.shape, dtype=dtype)

    def fill(piece: Piece, numbers: Tensor) -> None:
        # A division, not a product with the inverse: that would move some ties and some neighbours of ties.
        numbers.div_(scale[piece.rows, piece.tiles, None])
        codes[piece.rows, piece.columns].copy_(encode(piece, numbers).flatten(1))

    for_each_piece(x, size, fill)
    return codes


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
