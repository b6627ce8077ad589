"""How products are cut into tiles: one program computes a tile of y, walking along the columns of x and of the weight.

Chosen by what the compiler says of registers and shared memory, not by measuring: no GPU was at hand. None keeps
more than 16 bytes of a thread outside registers on compute capability 8.0 or 9.0. `bench/kernels/gpu.py` is there to measure.

    tokens at most   tile of y    why
    16               16 x 64      the least that tensor cores take; reading the weight is all that counts, so columns are split
                                  until about `PROGRAMS` programs read
    64               64 x 64      each weight is read once, and there are enough programs
    more             128 x 128    two accumulators of 64 registers in each of 256 threads, which may have 255
"""

from __future__ import annotations

from dataclasses import dataclass

DECODE = 16  # tokens up to which columns are split
PROGRAMS = 256  # about two for each multiprocessor of a large GPU; fixed, so that every GPU gives the same sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program does.

    tokens, rows: of y.
    columns:      of x and of the weight, in one step.
    warps:        that share the work.
    stages:       steps whose loads are under way at once.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A tile and in how many parts the columns go, each of `span` columns, the last one of what is left."""

    tile: Tile
    splits: int
    span: int


def cut(tokens: int, rows: int, columns: int, group_size: int) -> Cut:
    """For x [tokens, columns] and a weight [rows, columns]; no step crosses the end of a group.

    Args:
      group_size: a multiple of 32, or `columns` and more for one scale a row.
    """
    step = 128 if group_size >= columns else min(128, group_size & -group_size)
    if tokens <= DECODE:
        tile = Tile(tokens=16, rows=64, columns=step, warps=4, stages=4)
    elif tokens <= 64:
        tile = Tile(tokens=64, rows=64, columns=min(step, 64), warps=4, stages=3)
    else:
        tile = Tile(tokens=128, rows=128, columns=min(step, 64), warps=8, stages=3)
    steps = -(-columns // tile.columns)
    splits = min(steps, max(1, PROGRAMS // -(-rows // tile.rows))) if tokens <= DECODE else 1
    span = -(-steps // splits) * tile.columns
    return Cut(tile, -(-columns // span), span)
