"""The scales of AWQ and their search: laws, edges, and that outputs gain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.tensor import dequantize, parse_scheme, quantize
from halfbin.transforms import RATIOS, awq_scale, layer_loss, relative_magnitude, search_scale
from halfbin.transforms.limits import LARGEST

INT4 = parse_scheme("int4-g8")


def outliers(features: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs of which two channels are 50 times as large, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, features, generator=generator)
    x[:, [3, 17]] *= 50
    return x, torch.randn(16, features, generator=generator)


@pytest.mark.parametrize("w_mean", [None, torch.tensor([0.1, 0.5, 0.3, 0.0])], ids=["x", "x and w"])
def test_ratio_0_is_exactly_1(w_mean: Tensor | None) -> None:
    assert torch.equal(awq_scale(torch.tensor([1.0, 16.0, 0.0, 4.0]), 0, w_mean), torch.ones(4))


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_scales_are_centred_on_1_and_follow_the_power(ratio: float) -> None:
    scale = awq_scale(torch.tensor([1.0, 16.0, 0.0, 4.0]), ratio)
    alive = scale[[0, 1, 3]].double()
    # Powers and quotients in float64, then one rounding to float32 for each of the two.
    assert float(alive.min() * alive.max()) == pytest.approx(1, rel=2.0**-23)
    assert float(alive[1] / alive[0]) == pytest.approx(16**ratio, rel=2.0**-23)
    assert float(alive[2] / alive[0]) == pytest.approx(4**ratio, rel=2.0**-23)
    assert float(scale[2]) == 1  # always 0: nothing to protect


def test_larger_inputs_give_the_same_scales() -> None:
    mean = torch.tensor([1.0, 16.0, 0.5])
    assert torch.equal(awq_scale(mean, 0.5), awq_scale(mean * 1024, 0.5))


def test_with_weights_columns_that_stand_out_get_smaller_scales() -> None:
    mean, w_mean = torch.ones(3), torch.tensor([1.0, 0.25, 1.0])
    scale = awq_scale(mean, 0.5, w_mean)
    assert float(scale[1] / scale[0]) == pytest.approx(2)
    assert torch.equal(awq_scale(mean, 1.0, w_mean), torch.ones(3))  # then only inputs count


@pytest.mark.parametrize("mean", [[0.0, 0.0], [3.0], [2.0, 2.0]], ids=["all dead", "one channel", "all alike"])
def test_nothing_to_tell_apart_gives_1(mean: list[float]) -> None:
    assert torch.equal(awq_scale(torch.tensor(mean), 0.5), torch.ones(len(mean)))


def test_a_channel_that_is_hardly_used_does_not_move_the_others_beyond_the_limit() -> None:
    scale = awq_scale(torch.tensor([1e-30, 1.0, 1e-3]), 1.0)
    assert float(scale.max()) == LARGEST
    assert float(scale.min()) == 1 / LARGEST
    assert float(scale[2] / scale[1]) == pytest.approx(1e-3)


def test_relative_magnitude_is_the_mean_over_rows_of_shares_of_the_tiles_largest() -> None:
    weight = torch.tensor([[1.0, -2.0, 5.0], [4.0, 0.0, 0.0]])
    assert relative_magnitude(weight, parse_scheme("int4-g2")).tolist() == [0.75, 0.5, 0.5]
    assert relative_magnitude(weight, parse_scheme("int4-tensor")).tolist() == pytest.approx([0.5, 0.2, 0.5])
    with pytest.raises(SchemeError, match=r"got \[3\]"):
        relative_magnitude(torch.ones(3), INT4)


@pytest.mark.parametrize("spelling", ["int4-g8", "int4-g8-asym", "int3-channel", "nf4-g32", "int4-g10"])
@pytest.mark.parametrize("ratio", [0.0, 0.45])
def test_the_loss_is_that_of_the_outputs(spelling: str, ratio: float) -> None:
    (x, weight), scheme = outliers(), parse_scheme(spelling)
    scale = awq_scale(x.abs().mean(0), ratio)
    w_hat = dequantize(quantize(weight * scale, scheme)).double() / scale.double()
    expected = float((x.double() @ (w_hat - weight.double()).T).square().sum())
    # Cancellation: the error is a difference of float32 weights, off by 2^-23 of the weight, which is 100 times as large.
    assert layer_loss(weight, scheme, x.T @ x, scale) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("spelling", ["int4-g8", "int4-g8-asym", "int3-channel", "nf4-g32"])
def test_the_search_lowers_the_error_where_channels_stand_out(spelling: str) -> None:
    (x, weight), scheme = outliers(), parse_scheme(spelling)
    moment, mean = x.T @ x, x.abs().mean(0)
    best, losses = search_scale((awq_scale(mean, r) for r in RATIOS), lambda s: layer_loss(weight, scheme, moment, s))
    assert len(losses) == 20
    assert min(losses) < 0.7 * losses[0]  # the first is rounding to nearest
    assert layer_loss(weight, scheme, moment, best) == min(losses)
    assert float(best[3]) > 2 * float(best[4])


def test_of_equal_candidates_the_first_is_taken_and_nan_never_wins() -> None:
    first, second, third = (torch.full((2,), v) for v in (1.0, 2.0, 3.0))
    assert search_scale([first, second], lambda scale: 1.0)[0] is first
    values = {1.0: float("nan"), 2.0: 5.0, 3.0: 4.0}
    best, losses = search_scale([first, second, third], lambda scale: values[float(scale[0])])
    assert best is third
    assert losses == [float("inf"), 5.0, 4.0]
    assert search_scale([first], lambda scale: float("nan"))[0] is first


@pytest.mark.parametrize(
    ("mean", "ratio"),
    [([1.0, -1.0], 0.5), ([1.0, float("nan")], 0.5), ([1.0, float("inf")], 0.5), ([1.0, 2.0], 1.5)],
    ids=["negative", "NaN", "infinite", "ratio"],
)
def test_nonsense_is_refused(mean: list[float], ratio: float) -> None:
    with pytest.raises(DataError, match=f"ratio={ratio} must be in"):
        awq_scale(torch.tensor(mean), ratio)


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[3\] channels and \[1\] columns"):
        awq_scale(torch.ones(3), 0.5, torch.ones(1))
