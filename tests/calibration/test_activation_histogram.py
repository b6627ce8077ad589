"""Counts against plain loops, doubling, and ranges against the estimators on the numbers themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.streams import samples
from halfbin.calibration import ActivationHistogram
from halfbin.errors import SchemeError
from halfbin.numerics import ESTIMATORS, FORMATS, Entropy, Grid, MeanSquaredError, MinMax, Percentile, ScaleFormat

INT8 = Grid(FORMATS["int8"])
UINT8 = Grid(FORMATS["uint8"], symmetric=False)
UINT8_WITHOUT_ZERO_POINT = Grid(FORMATS["uint8"])
FP8 = Grid(FORMATS["fp8_e4m3"], scale_format=ScaleFormat.FLOAT16)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


def observed(*some: Tensor, num_bins: int = 2048) -> ActivationHistogram:
    histogram = ActivationHistogram(some[0].shape[-1], num_bins)
    for x in some:
        histogram.add(x)
    return histogram


def bin_of(value: float, width: float, num_bins: int) -> int:
    steps = math.floor(abs(value) / width)  # width is a power of two: exact in float64
    return num_bins - 1 - steps if value < 0 else num_bins + steps


@settings(deadline=None)
@example([[0.0], [1e-30]])
@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5))
def test_any_numbers_are_in_their_bins_and_any_split_gives_the_same_counts(stream: list[list[float]]) -> None:
    parts = [torch.tensor(values).unsqueeze(1) for values in stream]
    whole = observed(torch.cat(parts), num_bins=8)
    found = whole.histogram
    expected = [0] * 16
    for value in torch.cat(parts).flatten().tolist():
        if value:
            expected[bin_of(value, found.bin_width, 8)] += 1
    assert found.counts.tolist() == expected
    assert found.num_zeros == sum(value == 0 for values in stream for value in values)
    for order in (parts, parts[::-1]):
        merged = ActivationHistogram(1, 8)
        for part in order:
            merged.merge(observed(part, num_bins=8))
        assert torch.equal(merged.histogram.counts, found.counts)
        assert (merged.histogram.num_zeros, merged.bin_width) == (found.num_zeros, found.bin_width)
        assert (merged.histogram.minimum, merged.histogram.maximum) == (found.minimum, found.maximum)


def test_the_limit_is_the_next_power_of_two_and_doubling_merges_neighbours() -> None:
    histogram = observed(torch.tensor([[0.9], [-0.3], [0.5]]), num_bins=4)
    assert histogram.bin_width == 0.25
    assert histogram.histogram.counts.tolist() == [0, 0, 1, 0, 0, 0, 1, 1]
    histogram.add(torch.tensor([[1.0]]))  # not below 1: the limit becomes 2
    assert histogram.bin_width == 0.5
    assert histogram.histogram.counts.tolist() == [0, 0, 0, 1, 0, 2, 1, 0]


def test_nothing_is_lost_when_samples_are_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observed(*samples()).histogram
    monkeypatch.setattr("halfbin.calibration.activation_histogram._CHUNK", 7)
    assert torch.equal(observed(*samples()).histogram.counts, whole.counts)
    assert int(whole.counts.sum()) + whole.num_zeros == sum(x.numel() for x in samples())


@pytest.mark.parametrize("num_bins", [0, 1, 3, 6, 1000])
def test_bins_that_cannot_merge_are_refused(num_bins: int) -> None:
    with pytest.raises(SchemeError, match="power of two"):
        ActivationHistogram(4, num_bins)


def heavy_tailed(sign: str) -> Tensor:
    x = torch.randn(300, 50, generator=torch.Generator().manual_seed(7)) ** 3
    x[x.abs() < 0.01] = 0.0
    return {"both": x, "positive": x.abs(), "negative": -x.abs()}[sign]


SIGNS = pytest.mark.parametrize("sign", ["both", "positive", "negative"])


@SIGNS
@pytest.mark.parametrize("grid", [INT8, UINT8, FP8], ids=["int8", "uint8-asym", "fp8"])
def test_minmax_is_exact(grid: Grid, sign: str) -> None:
    x = heavy_tailed(sign)
    minimum, maximum = observed(x).range(grid, MinMax())
    assert (float(minimum), float(maximum)) == (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
    assert minimum.shape == maximum.shape == () and minimum.dtype == torch.float32


@SIGNS
@pytest.mark.parametrize("percent", [60.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_within_its_bin_and_clips_no_more(percent: float, sign: str) -> None:
    x, histogram = heavy_tailed(sign), observed(heavy_tailed(sign))
    found = torch.stack(histogram.range(INT8, Percentile(percent)))
    expected = torch.cat(Percentile(percent)(x.flatten().unsqueeze(0), INT8))
    outwards = (found - expected) * torch.tensor([-1.0, 1.0])
    assert bool((outwards >= 0).all()) and bool((outwards <= histogram.bin_width).all())


def test_a_percentile_of_almost_only_zeros_is_the_whole_range() -> None:
    x = torch.zeros(5000, 1)
    x[7], x[8] = 0.25, -0.5
    assert [float(end) for end in observed(x).range(INT8, "percentile")] == [-0.5, 0.25]


def squared_error(x: Tensor, grid: Grid, minimum: Tensor, maximum: Tensor) -> float:
    scale, zero_point = grid.params(minimum, maximum)
    return float((grid.decode(grid.encode(x, scale, zero_point), scale, zero_point) - x).double().square().sum())


@SIGNS
@pytest.mark.parametrize("grid", [INT8, UINT8, FP8], ids=["int8", "uint8-asym", "fp8"])
def test_the_least_squared_error_is_close_to_that_of_all_numbers(grid: Grid, sign: str) -> None:
    x = heavy_tailed(sign)
    exact = MeanSquaredError()(x.flatten().unsqueeze(0), grid)
    found = observed(x, num_bins=1 << 13).range(grid, MeanSquaredError())
    # Candidates are the same; a bin's centre stands for numbers up to half a bin, 1/64 of an 8-bit step, away.
    assert squared_error(x, grid, *found) <= 1.02 * squared_error(x, grid, exact[0][0], exact[1][0])


def test_numbers_at_the_centres_of_bins_give_exactly_the_range_of_all_numbers() -> None:
    codes = (torch.randn(4000, 1, generator=torch.Generator().manual_seed(8)) ** 3 * 20).clamp(-1023, 1023)
    x = (torch.trunc(codes) + torch.where(codes < 0, -0.5, 0.5)) / 1024
    x[0] = 1023.5 / 1024
    for grid in (Grid(FORMATS["int4"]), Grid(FORMATS["uint4"], symmetric=False)):
        exact = torch.cat(MeanSquaredError()(x.T, grid))
        assert torch.equal(torch.stack(observed(x, num_bins=1024).range(grid, "mse")), exact)
        assert float(exact[1]) < float(x.max())


@SIGNS
@pytest.mark.parametrize("grid", [INT8, UINT8, UINT8_WITHOUT_ZERO_POINT], ids=["int8", "uint8-asym", "uint8"])
def test_entropy_on_equal_bins_is_that_of_all_numbers(grid: Grid, sign: str) -> None:
    x = heavy_tailed(sign)
    x *= (1 - 2.0**-20) / x.abs().max()  # the largest |x| all but fills the last of 2048 bins
    exact = torch.cat(Entropy(2048)(x.flatten().unsqueeze(0), grid))
    found = torch.stack(observed(x).range(grid, "entropy"))
    # Both cut [0, absmax] into 2048 bins, whose edges differ by 2**-20; the few numbers in between change bins.
    assert bool(((found - exact).abs() <= 2 * 2.0**-11).all())


def test_entropy_clips_a_lone_outlier_and_keeps_an_even_distribution() -> None:
    x = torch.rand(20000, 1, generator=torch.Generator().manual_seed(5))
    assert float(observed(x).range(INT8, "entropy")[1]) > 0.95
    x[0] = 8.0
    assert float(observed(x).range(INT8, "entropy")[1]) < 2.0


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("grid", [INT8, UINT8], ids=["int8", "uint8-asym"])
def test_zeros_one_number_and_nothing_have_ranges(name: str, grid: Grid) -> None:
    assert [float(end) for end in ActivationHistogram(3).range(grid, name)] == [0.0, 0.0]
    assert [float(end) for end in observed(torch.zeros(4, 3)).range(grid, name)] == [0.0, 0.0]
    for value, zeros in itertools.product((3.0, -1e-30, 2.0**120), (0, 5)):
        minimum, maximum = observed(torch.tensor([[value]] + [[0.0]] * zeros)).range(grid, name)
        assert (float(minimum), float(maximum)) == (min(value, 0.0), max(value, 0.0)) or value == -1e-30
        assert float(minimum) <= 0.0 <= float(maximum)


def test_what_is_no_estimator_is_refused() -> None:
    histogram = observed(*samples())
    with pytest.raises(SchemeError, match="expected one of minmax, percentile, mse, entropy"):
        histogram.range(INT8, "median")
    with pytest.raises(SchemeError, match="evenly spaced codes"):
        histogram.range(FP8, "entropy")
    with pytest.raises(SchemeError, match="not defined on histograms"):
        histogram.range(INT8, lambda tiles, grid: (tiles[:, 0], tiles[:, 0]))
