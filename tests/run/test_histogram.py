"""Weights counted in steps of their scale."""

from __future__ import annotations

import pytest
import torch

from halfbin.run.histogram import finite_levels, weight_histogram
from halfbin.tensor.mixed import MixedTensor, take_columns
from halfbin.tensor.qtensor import quantize
from halfbin.tensor.scheme import parse_scheme


@pytest.mark.parametrize(
    "spelling", ["int4-g32", "int4-g32-asym", "int8-channel", "nf4-g64", "fp8_e4m3-channel", "mxfp4"]
)
def test_every_weight_is_counted_once(spelling: str) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    histogram = weight_histogram(weight, quantize(weight, parse_scheme(spelling)))
    assert sum(histogram.counts) == weight.numel()
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.edges[0] < histogram.levels[0] and histogram.levels[-1] < histogram.edges[-1]


def test_weights_on_a_level_are_counted_at_that_level() -> None:
    weight = torch.tensor([[-7.0, -7.0, 3.0, 7.0]])  # the scale is 1, as int4 reaches 7
    histogram = weight_histogram(weight, quantize(weight, parse_scheme("int4-channel")), num_bins=16)
    assert histogram.counts == (0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1)


def test_what_was_clipped_counts_at_the_end() -> None:
    weight = torch.tensor([[100.0, -100.0, 0.0]])
    q = quantize(weight, parse_scheme("int4-channel"), scale=torch.tensor([[1.0]]))
    histogram = weight_histogram(weight, q, num_bins=16)
    assert histogram.counts[0] == histogram.counts[-1] == 1


def test_minus_zero_and_zero_are_one_level() -> None:
    assert finite_levels(parse_scheme("mxfp4").format) == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_columns_in_floating_point_are_not_counted() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    rest, columns = take_columns(weight, torch.tensor([1, 5, 9]), torch.float32)
    scheme = parse_scheme("int8-channel")
    histogram = weight_histogram(weight, MixedTensor(quantize(rest, scheme), columns))
    kept = [i for i in range(32) if i not in (1, 5, 9)]
    assert histogram.counts == weight_histogram(weight[:, kept], quantize(weight[:, kept], scheme)).counts
    assert sum(histogram.counts) == 8 * 29
