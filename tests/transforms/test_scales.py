"""The scales of AWQ and SmoothQuant: laws, edges, and that they do what they are for."""

from __future__ import annotations

import pytest
import torch

from halfbin.errors import DataError
from halfbin.tensor import dequantize, parse_scheme, quantize
from halfbin.transforms import awq_scale, layer_loss, search_scale, smoothing_scale

INT4 = parse_scheme("int4-g8")


def outliers(features: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of which two channels are 50 times as large, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, features, generator=generator)
    x[:, [3, 17]] *= 50
    return x, torch.randn(16, features, generator=generator)


def test_ratio_0_is_rounding_to_nearest() -> None:
    x, weight = outliers()
    scale = awq_scale(x.abs().mean(0), 0)
    assert torch.equal(scale, torch.ones(32))
    difference = (dequantize(quantize(weight, INT4)) - weight).double()
    moment = x.T @ x
    # Both sum the same float32 products; 16 rows of 32 terms.
    assert layer_loss(weight, INT4, moment, scale) == pytest.approx(
        float((x.double() @ difference.T).square().sum()), rel=1e-4
    )


def test_the_search_lowers_the_error_where_channels_stand_out() -> None:
    x, weight = outliers()
    moment, mean = x.T @ x, x.abs().mean(0)
    best, losses = search_scale(
        [awq_scale(mean, i / 20) for i in range(20)], lambda s: layer_loss(weight, INT4, moment, s)
    )
    assert min(losses) < 0.7 * losses[0]
    assert layer_loss(weight, INT4, moment, best) == min(losses)
    assert best[3] > 2 * best[4]


def test_of_equal_candidates_the_first_is_taken() -> None:
    first, second = torch.ones(2), torch.ones(2) * 2
    assert search_scale([first, second], lambda scale: 1.0)[0] is first


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_scales_are_centred_on_1_and_follow_the_power(ratio: float) -> None:
    mean = torch.tensor([1.0, 16.0, 0.0, 4.0])
    scale = awq_scale(mean, ratio)
    assert float(scale[[0, 1, 3]].min() * scale[[0, 1, 3]].max()) == pytest.approx(1)
    assert float(scale[1] / scale[0]) == pytest.approx(16**ratio)
    assert float(scale[2]) == 1  # always 0: nothing to protect


def test_smoothing_divides_the_difficulty_as_alpha_says() -> None:
    x, w = torch.tensor([100.0, 1.0, 4.0]), torch.tensor([1.0, 1.0, 0.25])
    assert torch.allclose(smoothing_scale(x, w, 1.0), x)  # all inputs then have the range 1
    assert torch.allclose(smoothing_scale(x, w, 0.0), 1 / w)
    half = smoothing_scale(x, w, 0.5)
    assert torch.allclose(x / half, w * half)  # both sides alike


def test_dead_channels_keep_their_scale_and_nonsense_is_refused() -> None:
    dead = smoothing_scale(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert dead.tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match=r"alpha=1.5"):
        smoothing_scale(torch.ones(2), torch.ones(2), 1.5)


def test_the_product_is_what_it_was() -> None:
    x, weight = outliers()
    scale = smoothing_scale(x.abs().amax(0), weight.abs().amax(0), 0.5)
    expected, got = x @ weight.T, (x / scale) @ (weight * scale).T
    bound = 32 * 2.0**-23 * (x.abs() @ weight.abs().T)
    assert bool(((expected - got).abs() <= 4 * bound).all())
    assert float((x / scale).abs().amax(0).max()) < 0.2 * float(x.abs().max())
