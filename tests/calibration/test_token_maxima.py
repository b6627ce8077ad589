"""Maxima of tokens and their quantiles against sorting."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.streams import samples
from halfbin.calibration import TokenMaxima
from halfbin.errors import DataError


def observed(num: int = 6) -> TokenMaxima:
    maxima = TokenMaxima(37)
    for x in samples(num):
        maxima.add(x)
    return maxima


def test_they_come_in_the_order_of_the_tokens() -> None:
    assert torch.equal(observed().values, torch.cat(samples()).abs().amax(1))


@pytest.mark.parametrize("num", [1, 6])
@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
def test_a_quantile_is_the_nearest_rank(percent: int, num: int) -> None:
    maxima = observed(num)
    rising = sorted(maxima.values.tolist())
    rank = max(math.ceil(percent * len(rising) / 100), 1)
    assert maxima.quantile(percent / 100) == rising[rank - 1]


def test_a_token_of_zeros_counts() -> None:
    maxima = TokenMaxima(4)
    maxima.add(torch.tensor([[0.0] * 4, [1.0, -2.0, 0.0, 0.0]]))
    assert maxima.values.tolist() == [0.0, 2.0]
    assert maxima.quantile(0.5) == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan], ids=str)
def test_a_share_without_meaning_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="ask for 0 to 1"):
        observed().quantile(share)


def test_no_token_has_no_quantile() -> None:
    with pytest.raises(DataError, match="of 0 tokens"):
        TokenMaxima(4).quantile(0.5)
