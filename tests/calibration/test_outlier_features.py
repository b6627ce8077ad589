"""Which input features count as outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.calibration import InputStatistics, outlier_features


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)


def observed(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1])
    for part in torch.split(x, 16):
        statistics.add(part)
    return statistics


def test_features_that_are_far_larger_than_others_are_outliers() -> None:
    x = normal(64, 32)
    assert outlier_features(observed(x), 6.0).tolist() == []
    x[:, [3, 17]] *= 64
    assert outlier_features(observed(x), 6.0).tolist() == [3, 17]
    assert outlier_features(observed(x), 1000.0).tolist() == []


def test_a_feature_that_is_huge_on_one_token_is_one() -> None:
    x = normal(64, 32)
    x[40, 5] = 500.0  # a root mean square of 62
    assert outlier_features(observed(x), 6.0).tolist() == [5]


def test_where_all_are_large_none_stands_out() -> None:
    assert outlier_features(observed(50 * normal(64, 32)), 6.0).tolist() == []


def test_what_stands_out_below_the_threshold_is_none() -> None:
    x = 0.01 * normal(64, 32)
    x[:, 3] *= 64
    assert outlier_features(observed(x), 6.0).tolist() == []
    assert outlier_features(observed(x), 1.0).tolist() == [3]


def test_features_that_are_always_zero_make_no_outlier_of_the_others() -> None:
    x = 20 * normal(64, 32)
    x[:, 8:] = 0
    assert outlier_features(observed(x), 6.0).tolist() == []
    x[:, 3] *= 64
    assert outlier_features(observed(x), 6.0).tolist() == [3]
    assert outlier_features(observed(torch.zeros(64, 32)), 6.0).tolist() == []
    assert outlier_features(InputStatistics(32), 6.0).tolist() == []


def test_dividing_an_outlier_away_makes_it_none() -> None:
    x = normal(64, 32)
    x[:, 3] *= 64
    statistics, scale = observed(x), torch.ones(32)
    scale[3] = 64
    statistics.divide(scale)
    assert outlier_features(statistics, 6.0).tolist() == []
