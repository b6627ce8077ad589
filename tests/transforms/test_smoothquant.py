"""SmoothQuant's scales: laws, edges, and that products in 8 bits gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.tensor import InputQuantizer, parse_inputs, parse_scheme
from halfbin.transforms import product_loss, search_scale, smoothing_scale
from halfbin.transforms.limits import LARGEST

ALPHAS = [i / 20 for i in range(21)]


def outliers(features: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs of which two channels are 50 times as large, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, features, generator=generator)
    x[:, [3, 17]] *= 50
    return x, torch.randn(16, features, generator=generator)


def ranges(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.abs().amax(0), weight.abs().amax(0)


def test_alpha_divides_the_difficulty() -> None:
    x, w = torch.tensor([100.0, 1.0, 4.0]), torch.tensor([1.0, 1.0, 0.25])
    assert torch.allclose(smoothing_scale(x, w, 1.0), x)  # all inputs then have the range 1
    assert torch.allclose(smoothing_scale(x, w, 0.0), 1 / w)  # and here all columns
    half = smoothing_scale(x, w, 0.5)
    assert torch.allclose(x / half, w * half)  # both sides alike


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_the_product_is_what_it_was(alpha: float) -> None:
    x, weight = outliers()
    scale = smoothing_scale(*ranges(x, weight), alpha)
    expected, got = x.double() @ weight.double().T, (x / scale) @ (weight * scale).T
    # Two roundings in each factor, and a sum of 32.
    assert bool(((expected - got).abs() <= (32 + 2) * 2.0**-24 * (x.abs() @ weight.abs().T)).all())


def test_outlier_channels_are_flattened_and_weights_pay() -> None:
    x, weight = outliers()
    scale = smoothing_scale(*ranges(x, weight), 0.5)

    def peak(ranges: Tensor) -> float:
        return float(ranges.max() / ranges.median())

    before, after = peak(x.abs().amax(0)), peak((x / scale).abs().amax(0))
    assert before > 40
    assert after == pytest.approx(before**0.5, rel=0.3)  # 0.3: the columns' own ranges
    assert peak((weight * scale).abs().amax(0)) > 3 * peak(weight.abs().amax(0))
    flat = (x / smoothing_scale(*ranges(x, weight), 1.0)).abs().amax(0)
    assert torch.allclose(flat, torch.ones(32))


def test_dead_channels_and_columns_keep_their_scale() -> None:
    scale = smoothing_scale(torch.tensor([0.0, 5.0, 9.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert scale.tolist() == [1.0, 1.0, 3.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scales_of_any_ranges_can_be_stored(alpha: float) -> None:
    extremes = torch.tensor([1e-45, 1e-30, 1.0, 1e30, 3e38, 0.0])
    x, w = (m.flatten() for m in torch.meshgrid(extremes, extremes, indexing="ij"))
    scale = smoothing_scale(x, w, alpha)
    assert scale.dtype == torch.float32
    assert bool(((scale >= 1 / LARGEST) & (scale <= LARGEST)).all())


def test_one_channel() -> None:
    assert smoothing_scale(torch.tensor([9.0]), torch.tensor([1.0]), 0.5).tolist() == [3.0]


def test_a_search_for_alpha_lowers_the_error_of_products_in_8_bits() -> None:
    (x, weight), int8 = outliers(), parse_scheme("int8-channel")
    candidates = [torch.ones(32), *(smoothing_scale(*ranges(x, weight), a) for a in ALPHAS)]

    def loss(scale: Tensor) -> float:
        return product_loss(x, weight, scale, inputs=InputQuantizer(parse_inputs("int8-token")), weights=int8)

    best, losses = search_scale(candidates, loss)
    assert min(losses) < 0.1 * losses[0]
    alpha = ALPHAS[losses.index(min(losses)) - 1]
    assert 0.2 < alpha < 0.8  # neither side can carry it alone
    assert loss(best) == min(losses)


def test_the_loss_of_a_product_is_that_of_its_outputs() -> None:
    x, weight = outliers()
    wide = parse_scheme("int8-channel")
    scale = smoothing_scale(*ranges(x, weight), 0.5)
    step_x, step_w = ((m.abs().amax(1, keepdim=True) / 127).double() for m in (x / scale, weight * scale))
    x_hat = ((x / scale).double() / step_x).round() * step_x
    w_hat = ((weight * scale).double() / step_w).round() * step_w
    expected = float((x.double() @ weight.double().T - x_hat @ w_hat.T).square().sum())
    got = product_loss(x, weight, scale, inputs=InputQuantizer(parse_inputs("int8-token")), weights=wide)
    assert got == pytest.approx(expected, rel=1e-3)  # outputs of 100 in float32 against errors of about 0.1


@pytest.mark.parametrize(
    ("x", "w", "alpha"),
    [
        ([1.0], [1.0], 1.5),
        ([1.0, 1.0], [1.0], 0.5),
        ([-1.0], [1.0], 0.5),
        ([float("nan")], [1.0], 0.5),
        ([1.0], [float("inf")], 0.5),
    ],
    ids=["alpha", "width", "negative", "NaN", "infinite"],
)
def test_nonsense_is_refused(x: list[float], w: list[float], alpha: float) -> None:
    with pytest.raises(DataError, match=f"alpha={alpha} must be in"):
        smoothing_scale(torch.tensor(x), torch.tensor(w), alpha)
