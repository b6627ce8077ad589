"""Sums of x x^T: what they are, and that splitting the work does not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.calibration import SecondMoment
from halfbin.errors import DataError


def samples(num: int = 6, features: int = 37) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5 + i, features, generator=generator) for i in range(num)]


def observed(some: list[Tensor]) -> SecondMoment:
    moment = SecondMoment(some[0].shape[-1])
    for sample in some:
        moment.add(sample)
    return moment


@pytest.mark.parametrize("features", [1, 7, 8, 37])
def test_it_is_the_sum_over_tokens_of_x_times_x(features: int) -> None:
    some = samples(features=features)
    moment, x = observed(some), torch.cat(some).double()
    expected = x.T @ x
    # Each sample's sum of at most 10 products is rounded in float32.
    bound = 10 * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
    assert bool(((moment.matrix() - expected).abs() <= bound).all())
    assert moment.num_tokens == len(x)


def test_it_is_symmetric_to_the_bit() -> None:
    matrix = observed(samples()).matrix()
    assert torch.equal(matrix, matrix.T)


def test_two_observers_merged_are_one_that_saw_both_streams() -> None:
    some = samples()
    whole = observed(some)
    for cut in range(1, len(some)):
        first, second = observed(some[:cut]), observed(some[cut:])
        first.merge(second)
        assert first.num_tokens == whole.num_tokens
        # Only float64 additions come in another order.
        assert torch.allclose(first.matrix(), whole.matrix(), rtol=1e-14, atol=1e-14 * float(whole.matrix().max()))


def test_leading_dimensions_are_tokens() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(observed([x]).matrix(), observed([x.view(6, 8)]).matrix())


@pytest.mark.parametrize(
    ("x", "words"),
    [
        pytest.param(torch.ones(2, 9), "9 features, expected 8", id="width"),
        pytest.param(torch.tensor([[1.0] * 7 + [float("nan")]]), "in feature 7", id="NaN"),
        pytest.param(torch.tensor([[1e30] + [1.0] * 7]), "in feature 0", id="overflow"),
    ],
)
def test_what_would_spoil_the_sum_is_refused(x: Tensor, words: str) -> None:
    moment = SecondMoment(8)
    with pytest.raises(DataError, match=words):
        moment.add(x)
    assert moment.num_tokens == 0 and not moment.matrix().any()
