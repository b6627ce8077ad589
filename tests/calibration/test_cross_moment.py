"""Sums of x x_quantized^T: what they are, and that chunks made elsewhere give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.streams import samples
from halfbin.calibration import CrossMoment, SecondMoment, cross_product
from halfbin.errors import DataError


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(samples(), samples(seed=1), strict=True))


def observed(some: list[tuple[Tensor, Tensor]]) -> CrossMoment:
    moment = CrossMoment(37)
    for x, x_quantized in some:
        moment.add(x, x_quantized)
    return moment


def test_a_row_belongs_to_a_feature_of_the_float_stream() -> None:
    moment = observed(pairs())
    x, x_quantized = torch.cat(samples()).double(), torch.cat(samples(seed=1)).double()
    # Each sample's sum of at most 10 products is rounded in float32.
    bound = 10 * torch.finfo(torch.float32).eps * (x.abs().T @ x_quantized.abs())
    assert bool(((moment.matrix() - x.T @ x_quantized).abs() <= bound).all())
    assert moment.num_tokens == len(x)


def test_equal_streams_give_the_second_moment() -> None:
    cross, second = observed([(x, x) for x in samples()]), SecondMoment(37)
    for x in samples():
        second.add(x)
    x = torch.cat(samples()).double().abs()
    bound = 10 * torch.finfo(torch.float32).eps * (x.T @ x)
    assert bool(((cross.matrix() - second.matrix()).abs() <= bound).all())


def test_products_made_elsewhere_and_added_in_order_give_the_same_bits() -> None:
    moment = CrossMoment(37)
    for x, x_quantized in pairs():
        moment.add_product(cross_product(x, x_quantized), len(x))
    assert torch.equal(moment.matrix(), observed(pairs()).matrix())


def test_streams_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[5, 37\] and \[4, 37\]"):
        CrossMoment(37).add(torch.ones(5, 37), torch.ones(4, 37))
    with pytest.raises(DataError, match="channel 2"):
        CrossMoment(3).add(torch.ones(1, 3), torch.tensor([[1.0, 1.0, torch.nan]]))
    with pytest.raises(DataError, match=r"float32 product \[3, 3\]"):
        CrossMoment(3).add_product(torch.ones(3, 3, dtype=torch.float64), 1)
