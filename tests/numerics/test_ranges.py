"""Range estimators against plain loops over the published definitions, and the promises they make."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics import (
    ESTIMATORS,
    FORMATS,
    Entropy,
    Grid,
    MeanSquaredError,
    MinMax,
    Percentile,
    RangeEstimator,
    ScaleFormat,
)
from halfbin.numerics.ranges import _squared_error

INT8 = Grid(FORMATS["int8"])
INT4 = Grid(FORMATS["int4"])
UINT4 = Grid(FORMATS["uint4"], symmetric=False)
FP4 = Grid(FORMATS["fp4_e2m1"])
MXFP4 = Grid(FORMATS["fp4_e2m1"], scale_format=ScaleFormat.E8M0)
NF4 = Grid(FORMATS["nf4"], scale_format=ScaleFormat.FLOAT16)
GRIDS = {"int8": INT8, "int4": INT4, "uint4-asym": UINT4, "fp4": FP4, "mxfp4": MXFP4, "nf4-f16": NF4}


def tiles_with_outliers(num_tiles: int = 7, size: int = 500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(num_tiles, size, generator=generator)
    tiles[:, 0] = 20 * torch.arange(num_tiles)
    return tiles


def rounding_error(tiles: Tensor, estimator: RangeEstimator, grid: Grid) -> Tensor:
    minimum, maximum = estimator(tiles, grid)
    return _squared_error(tiles, minimum, maximum, grid)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("grid", [INT4, UINT4], ids=["int4", "uint4-asym"])
def test_every_estimator_gives_a_range_that_holds_zero_and_no_more_than_the_data(name: str, grid: Grid) -> None:
    tiles = tiles_with_outliers()
    tiles[1], tiles[2] = tiles[1].abs() + 1, -tiles[2].abs() - 1
    minimum, maximum = ESTIMATORS[name]()(tiles, grid)
    assert minimum.shape == maximum.shape == (7,)
    assert (minimum <= 0).all() and (maximum >= 0).all()
    assert (minimum >= tiles.amin(1).clamp(max=0)).all() and (maximum <= tiles.amax(1).clamp(min=0)).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_takes_zeros_one_element_and_narrow_types(name: str) -> None:
    for tiles in (torch.zeros(3, 5), torch.tensor([[2.0], [-3.0]]), torch.randn(2, 9).to(torch.bfloat16)):
        minimum, maximum = ESTIMATORS[name]()(tiles, INT4)
        assert torch.isfinite(minimum).all() and torch.isfinite(maximum).all()
        assert minimum.dtype == maximum.dtype == torch.float32
        if tiles.shape[1] == 1:
            assert torch.equal(torch.maximum(-minimum, maximum), tiles.abs().flatten())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_tile_is_judged_alone(name: str) -> None:
    tiles = tiles_with_outliers(size=200)
    together = torch.stack(ESTIMATORS[name]()(tiles, UINT4))
    alone = [torch.stack(ESTIMATORS[name]()(row[None], UINT4)) for row in tiles]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 99, 100, 101, 1000, 1001])
@pytest.mark.parametrize("percent", [50.1, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_nearest_rank(size: int, percent: float) -> None:
    generator = torch.Generator().manual_seed(size)
    tiles = torch.randn(4, size, generator=generator)
    minimum, maximum = Percentile(percent)(tiles, INT8)
    rank = math.ceil(round(percent * 10) * size / 1000)  # integers: no rounding to argue about
    for row, low, high in zip(tiles, minimum, maximum, strict=True):
        values = sorted(row.tolist())
        expected_low, expected_high = min(values[size - rank], 0.0), max(values[rank - 1], 0.0)
        if expected_low == expected_high:
            expected_low, expected_high = min(values[0], 0.0), max(values[-1], 0.0)
        assert (low.item(), high.item()) == (expected_low, expected_high)


def test_percentile_keeps_the_whole_range_of_a_tile_that_is_nearly_all_zeros() -> None:
    tiles = torch.zeros(1, 5000)
    tiles[0, 7], tiles[0, 8] = 0.25, -0.5
    assert [end.item() for end in Percentile()(tiles, INT8)] == [-0.5, 0.25]


@pytest.mark.parametrize("percent", [50.0, 0.1, 100.1, math.nan])
def test_a_percent_without_meaning_is_refused(percent: float) -> None:
    with pytest.raises(SchemeError, match="above 50 and at most 100"):
        Percentile(percent)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("magnitude", [1.0, 1e-41, 1e-30, 1e35], ids=["1", "subnormal", "1e-30", "1e35"])
def test_mean_squared_error_is_never_worse_than_the_whole_range(grid: Grid, magnitude: float) -> None:
    tiles = tiles_with_outliers() * magnitude
    assert (rounding_error(tiles, MeanSquaredError(), grid) <= rounding_error(tiles, MinMax(), grid)).all()


@pytest.mark.parametrize("grid", [INT4, UINT4, FP4], ids=["int4", "uint4-asym", "fp4"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e35], ids=["1", "1e-30", "1e35"])
def test_mean_squared_error_gains_on_a_normal_tile_of_any_magnitude(grid: Grid, magnitude: float) -> None:
    tiles = torch.randn(5, 2000, generator=torch.Generator().manual_seed(1)) * magnitude
    assert (rounding_error(tiles, MeanSquaredError(), grid) < 0.95 * rounding_error(tiles, MinMax(), grid)).all()


def test_mean_squared_error_finds_the_best_of_its_symmetric_candidates() -> None:
    tiles = tiles_with_outliers(3, 100)
    estimator = MeanSquaredError(num_candidates=8, smallest=0.3)
    minimum, maximum = estimator(tiles, INT4)
    for row, low, high in zip(tiles, minimum, maximum, strict=True):
        costs = {}
        for factor in torch.linspace(1.0, 0.3, 8).tolist():
            step = torch.tensor(max(-row.min().item(), row.max().item())) * factor / 7
            codes = (row / step).round().clamp(-8, 7)
            costs[factor] = ((codes * step - row).double() ** 2).sum().item()
        chosen = high / row.max() if row.max() > 0 else low / row.min()
        assert chosen.item() == pytest.approx(min(costs, key=costs.__getitem__), rel=1e-6)


def test_mean_squared_error_moves_the_ends_of_an_asymmetric_range_apart() -> None:
    tiles = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    tiles[:, 0] = -3.0  # one outlier at the low end; the high end is dense up to 1
    tiles[1] = -tiles[1]
    minimum, maximum = MeanSquaredError()(tiles, UINT4)
    assert minimum[0].item() > -2.0 and maximum[0].item() > 0.8
    assert minimum[1].item() < -0.8 and maximum[1].item() < 2.0


def test_mean_squared_error_does_not_depend_on_how_tiles_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tiles_with_outliers()
    whole = torch.stack(MeanSquaredError()(tiles, UINT4))
    monkeypatch.setattr("halfbin.numerics.ranges._CHUNK", 150)  # less than a tile: columns are cut too
    assert torch.equal(torch.stack(MeanSquaredError()(tiles, UINT4)), whole)


@pytest.mark.parametrize("arguments", [{"num_candidates": 0}, {"smallest": 0.0}, {"smallest": 1.5}], ids=str)
def test_a_search_without_candidates_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(SchemeError, match="num_candidates"):
        MeanSquaredError(**arguments)  # type: ignore[arg-type] # one dict for both argument types


def migacz_threshold(magnitude: list[float], levels: int, num_bins: int) -> float:
    """Slides 38-40 as plain loops over counts, with the departures that `Entropy` states."""
    absmax = max(magnitude)
    bins = [0] * num_bins
    for value in magnitude:
        bins[min(int(torch.tensor(value) / absmax * num_bins), num_bins - 1)] += 1
    bins[0] = bins[1]
    best, kept = math.inf, num_bins
    for i in range(num_bins, levels - 1, -1):
        p = [float(count) for count in bins[:i]]
        p[-1] += sum(bins[i:])
        q = [0.0] * i
        for level in range(levels):
            inside = range(level * i // levels, (level + 1) * i // levels)
            filled = [j for j in inside if bins[j]]
            for j in filled:
                q[j] = sum(bins[j] for j in filled) / len(filled)
        divergence = 0.0
        for p_j, q_j in zip(p, q, strict=True):
            if p_j:
                share = p_j / sum(p)
                divergence += share * math.log(share / (q_j / sum(q))) if q_j else math.inf
        if divergence < best - 1e-12:
            best, kept = divergence, i
    return absmax * kept / num_bins


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "ternary"])
def test_entropy_follows_the_slides(name: str) -> None:
    fmt = FORMATS[name]
    tiles = torch.randn(4, 400, generator=torch.Generator().manual_seed(3)) ** 3
    _, maximum = Entropy(num_bins=64)(tiles, Grid(fmt))
    minimum, _ = Entropy(num_bins=64)(-tiles, Grid(fmt))
    for row, high, low in zip(tiles, maximum, minimum, strict=True):
        expected = migacz_threshold(row.abs().tolist(), int(fmt.maximum) + 1, 64)
        assert high.item() == pytest.approx(min(expected, row.max().item()), rel=1e-6)
        assert low.item() == -high.item()


def test_entropy_counts_all_codes_for_a_one_sided_tile_of_an_asymmetric_grid() -> None:
    tiles = torch.randn(1, 400, generator=torch.Generator().manual_seed(4)).abs() ** 3
    _, maximum = Entropy(num_bins=64)(tiles, UINT4)
    assert maximum.item() == pytest.approx(migacz_threshold(tiles[0].tolist(), 16, 64), rel=1e-6)


def test_entropy_counts_half_the_codes_for_a_two_sided_tile_of_an_asymmetric_grid() -> None:
    tiles = torch.randn(1, 400, generator=torch.Generator().manual_seed(4)) ** 3
    minimum, maximum = Entropy(num_bins=64)(tiles, UINT4)
    expected = migacz_threshold(tiles[0].abs().tolist(), 8, 64)
    assert expected < min(tiles.max().item(), -tiles.min().item())
    assert [minimum.item(), maximum.item()] == pytest.approx([-expected, expected], rel=1e-6)


def test_entropy_clips_a_lone_outlier_and_keeps_an_even_distribution() -> None:
    tiles = torch.rand(2, 20000, generator=torch.Generator().manual_seed(5))
    tiles[1, 0] = 8.0
    _, maximum = Entropy()(tiles, INT8)
    assert maximum[0].item() > 0.95
    assert maximum[1].item() < 2.0


@pytest.mark.parametrize("grid", [FP4, NF4], ids=["fp4", "nf4"])
def test_entropy_refuses_formats_that_are_not_evenly_spaced(grid: Grid) -> None:
    with pytest.raises(SchemeError, match=r"evenly spaced codes.*use mse or minmax"):
        Entropy()(torch.ones(1, 4), grid)


def test_entropy_refuses_a_histogram_coarser_than_the_codes() -> None:
    with pytest.raises(SchemeError, match="num_bins=128 cannot tell the 256 codes of int8"):
        Entropy(num_bins=128)(torch.ones(1, 4), INT8)
