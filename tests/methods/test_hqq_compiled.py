"""The compiled alternation: the same bits on every instruction set and thread, and what the plain one finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.kernels.instruction_sets import usable
from halfbin.methods.hqq import Schedule, refuses, solve, solve_compiled
from halfbin.numerics.affine import Grid
from halfbin.tensor import parse_scheme

SCHEDULE = Schedule(iterations=20, p=0.7, beta=2.5, growth=1.01)
SCHEMES = ["int4", "int4-asym", "int3-bf16", "int8-asym-f16", "uint4", "nf4", "fp8_e4m3", "fp4_e2m1-e8m0", "ternary"]
Found = tuple[Tensor, Tensor | None]


def tiles_of(count: int, num_tiles: int = 64) -> Tensor:
    """Heavy tails, a tile of zeros, one with an outlier, one tiny, one huge."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(num_tiles, count, generator=generator) ** 3 * 0.02
    x[1] = 0.0
    x[2, 0] = 50.0
    x[3] *= 1e-36
    x[4] *= 1e30
    return x


def start(tiles: Tensor, grid: Grid) -> Found:
    return grid.params(tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True))


def norm_of(tiles: Tensor, grid: Grid, found: Found) -> Tensor:
    """The sum of |error|^p of each tile in its first steps, float64."""
    scale, zero = found
    x_hat = grid.decode(grid.encode(tiles, scale, zero), scale, zero, torch.float64)
    unit = start(tiles, grid)[0].to(torch.float64)
    return ((tiles.double() - x_hat) / unit).abs().pow(SCHEDULE.p).sum(1)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 128])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_it_finds_what_the_plain_alternation_finds(spelling: str, count: int) -> None:
    tiles, grid = tiles_of(count), parse_scheme(spelling).grid
    scale, zero = start(tiles, grid)
    plain = solve(tiles, grid, scale, zero, SCHEDULE)
    found = [solve_compiled(tiles, grid, scale, zero, SCHEDULE, instruction_set=name) for name in usable()]
    for other_scale, other_zero in found[1:]:
        assert torch.equal(other_scale.float(), found[0][0].float())
        assert other_zero is None or (found[0][1] is not None and torch.equal(other_zero, found[0][1]))
    # Powers that differ in their last bits end in other last bits of the scale, and where two iterates are as good as each
    # other, in the other one: so the norms agree, not the scales.
    best, expected = norm_of(tiles, grid, found[0]), norm_of(tiles, grid, plain)
    first = norm_of(tiles, grid, (scale, zero))
    # An error that the plain loop has 0 is here some float32 rounding of up to `span` steps, and as above in each element.
    span = max(abs(grid.format.minimum), grid.format.maximum) + 1
    slack = count * (4 * span * torch.finfo(torch.float32).eps) ** SCHEDULE.p
    assert bool((best <= first * (1 + 2**-18) + slack).all())
    close = (best - expected).abs() <= 1e-3 * expected + slack
    assert int(close.sum()) >= len(tiles) - 3


@pytest.mark.parametrize("spelling", ["int4", "int4-asym"])
def test_threads_change_no_bit(spelling: str) -> None:
    tiles, grid = tiles_of(128, 1500), parse_scheme(spelling).grid
    scale, zero = start(tiles, grid)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(solve_compiled(tiles, grid, scale, zero, SCHEDULE))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is None or (found[1][1] is not None and torch.equal(found[0][1], found[1][1]))


def test_it_refuses_what_it_has_no_arithmetic_for_in_words() -> None:
    assert refuses(torch.ones(2, 2)) is None
    assert "float64" in str(refuses(torch.ones(2, 2, dtype=torch.float64)))
    assert "meta" in str(refuses(torch.ones(2, 2, device="meta")))
