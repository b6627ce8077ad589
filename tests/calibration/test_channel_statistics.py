"""Extremes and means of channels against whole streams."""

from __future__ import annotations

import torch

from calibration.streams import DEAD, samples
from halfbin.calibration import ChannelStatistics


def observed(features: int = 37) -> ChannelStatistics:
    statistics = ChannelStatistics(features)
    for x in samples(features=features):
        statistics.add(x)
    return statistics


def test_they_are_those_of_the_whole_stream() -> None:
    statistics, x = observed(), torch.cat(samples())
    assert statistics.num_tokens == len(x)
    assert torch.equal(statistics.minimum, x.amin(0))
    assert torch.equal(statistics.maximum, x.amax(0))
    assert torch.equal(statistics.absmax, x.abs().amax(0))
    # Within a sample of at most 10 tokens 9 additions are rounded to float32.
    mean = x.double().abs().mean(0)
    assert bool(((statistics.mean_magnitude - mean).abs() <= 9 * 2.0**-24 * mean).all())


def test_a_dead_channel_is_exactly_zero_and_the_only_one() -> None:
    statistics = observed()
    for value in (statistics.absmax, statistics.mean_magnitude):
        assert torch.nonzero(value == 0).flatten().tolist() == [DEAD]


def test_a_channel_of_one_sign_keeps_its_two_ends() -> None:
    statistics = ChannelStatistics(2)
    statistics.add(torch.tensor([[3.0, -7.0], [5.0, -2.0]]))
    assert statistics.minimum.tolist() == [3.0, -7.0]
    assert statistics.maximum.tolist() == [5.0, -2.0]
    assert statistics.absmax.tolist() == [5.0, 7.0]


def test_means_do_not_drift_over_many_samples() -> None:
    statistics = ChannelStatistics(1)
    for _ in range(3000):
        statistics.add(torch.full((1, 1), 0.1))  # float32 sums of these are 1e-5 off after 3000
    assert abs(float(statistics.mean_magnitude) - float(torch.tensor(0.1))) < 1e-12


def test_before_the_first_token_all_is_zero() -> None:
    statistics = ChannelStatistics(3)
    assert not any(
        v.any() for v in (statistics.minimum, statistics.maximum, statistics.absmax, statistics.mean_magnitude)
    )
