"""Sums of x x^T: what they are, and when splitting the work changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.streams import DEAD, samples
from halfbin.calibration import SecondMoment, second_moment, upper_product
from halfbin.errors import DataError


@pytest.fixture(autouse=True)
def several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment, "STRIP", 8)


def observed(some: list[Tensor]) -> SecondMoment:
    moment = SecondMoment(some[0].shape[-1])
    for sample in some:
        moment.add(sample)
    return moment


@pytest.mark.parametrize("features", [1, 7, 8, 37, 40])
def test_it_is_the_sum_over_tokens_of_x_times_x(features: int) -> None:
    some = samples(features=features)
    moment, x = observed(some), torch.cat(some).double()
    # Each sample's sum of at most 10 products is rounded in float32.
    bound = 10 * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
    assert bool(((moment.matrix() - x.T @ x).abs() <= bound).all())
    assert moment.num_tokens == len(x)


def test_it_is_symmetric_to_the_bit() -> None:
    matrix = observed(samples()).matrix()
    assert torch.equal(matrix, matrix.T)


def test_products_made_elsewhere_and_added_in_order_give_the_same_bits() -> None:
    some = samples()
    moment = SecondMoment(37)
    for x in some:
        moment.add_product(upper_product(x), len(x))
    assert torch.equal(moment.matrix(), observed(some).matrix())
    assert moment.num_tokens == observed(some).num_tokens


def test_an_observer_handed_on_gives_the_same_bits() -> None:
    some = samples()
    first = observed(some[:2])
    for x in some[2:]:
        handed_on = SecondMoment(37)
        handed_on.merge(first)
        handed_on.add(x)
        first = handed_on
    assert torch.equal(first.matrix(), observed(some).matrix())


def test_the_product_of_a_sample_is_an_upper_triangle() -> None:
    product = upper_product(samples()[0])
    assert product.dtype == torch.float32
    assert torch.equal(product, product.triu()) and bool(product.triu(1).any())


@pytest.mark.parametrize("strip", [8, 384], ids=["five strips", "one strip"])
def test_threads_do_not_change_the_bits(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment, "STRIP", strip)
    some = [torch.randn(300, 37, generator=torch.Generator().manual_seed(3))]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(observed(some).matrix())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_dead_channel_has_an_empty_row_and_column() -> None:
    matrix = observed(samples()).matrix()
    assert not matrix[DEAD].any() and not matrix[:, DEAD].any()
    assert torch.nonzero(matrix.diagonal() == 0).flatten().tolist() == [DEAD]


def test_squares_beyond_float32_are_refused_before_anything_is_added() -> None:
    moment = SecondMoment(16)
    x = torch.ones(3, 16)
    x[1, 12] = -1e19
    with pytest.raises(DataError, match="channel 12"):
        moment.add(x)
    assert moment.num_tokens == 0 and not moment.matrix().any()


@pytest.mark.parametrize(
    ("product", "words"),
    [
        pytest.param(torch.ones(8, 7), r"expected a float32 product \[8, 8\]", id="shape"),
        pytest.param(torch.ones(8, 8, dtype=torch.float64), "float64", id="type"),
        pytest.param(torch.full((8, 8), torch.nan), "channel 0", id="NaN"),
    ],
)
def test_what_is_no_product_of_a_sample_is_refused(product: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        SecondMoment(8).add_product(product, 1)


@pytest.mark.parametrize("features", [1, 7, 8, 37])
def test_energy_is_that_of_the_outputs(features: int) -> None:
    some = samples(features=features)
    weight = torch.randn(13, features, generator=torch.Generator().manual_seed(1))
    outputs = torch.cat(some).double() @ weight.double().T
    magnitudes = torch.cat(some).double().abs() @ weight.double().abs().T
    # Sums of 10 products within a sample, of `features` within a product, and of as many in a row, all in float32.
    slack = (10 + 2 * features) * torch.finfo(torch.float32).eps * float(magnitudes.square().sum())
    assert abs(observed(some).energy(weight) - float(outputs.square().sum())) <= slack


def test_matrices_of_another_type_and_the_diagonal_are_the_matrix_rounded() -> None:
    moment = observed(samples())
    assert torch.equal(moment.matrix(torch.float32), moment.matrix().to(torch.float32))
    assert torch.equal(moment.diagonal(), moment.matrix().diagonal())


def test_a_moment_that_was_forgotten_holds_a_count_only() -> None:
    moment = observed(samples())
    moment.forget()
    assert moment.num_tokens == observed(samples()).num_tokens
    assert not moment._strips
