"""Laws that rounding keeps for every scheme and any weight, the edges, and what a `QTensor` refuses to be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics import FORMATS, IntegerFormat, MeanSquaredError, MinMax, Percentile, ScaleFormat
from halfbin.tensor import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    Scheme,
    dequantize,
    fit,
    parse_scheme,
    quantize,
    scale_shape,
)
from tensor.cases import FEW_SCHEMES, SCHEMES, excess, scale_per_element, usual_weights, values_of, weights

law = settings(max_examples=300, deadline=None, derandomize=True, database=None)
schemes = st.sampled_from(list(SCHEMES.values()))
EACH_SCHEME = pytest.mark.parametrize("scheme", FEW_SCHEMES.values(), ids=FEW_SCHEMES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: QTensor, b: QTensor) -> bool:
    parts = [(a.codes, b.codes), (a.scale.double(), b.scale.double())]
    if a.zero_point is not None and b.zero_point is not None:
        parts.append((a.zero_point, b.zero_point))
    return all(torch.equal(x, y) for x, y in parts) and (a.zero_point is None) == (b.zero_point is None)


# --- laws


@law
@given(weights(), schemes)
def test_no_weight_moves_by_more_than_half_the_gap_or_its_distance_to_the_range(weight: Tensor, scheme: Scheme) -> None:
    assert excess(weight, quantize(weight, scheme)) <= 0


UNIFORM = [
    scheme
    for scheme in SCHEMES.values()
    if isinstance(scheme.format, IntegerFormat)
    and scheme.scale_format is not ScaleFormat.E8M0  # rounds down, so that it may clip
    and not (scheme.symmetric and scheme.format.qmin == 0)  # holds no negative values
]


@law
@given(weights(usual_weights), st.sampled_from(UNIFORM))
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    assert isinstance(scheme.format, IntegerFormat)
    # weight / scale is off by eps per step of the grid before rounding, hence the slack in steps.
    slack = 4 * (scheme.format.qmax - scheme.format.qmin) * torch.finfo(torch.float32).eps
    moved = (dequantize(q).double() - weight.double()).abs()
    assert (moved <= scale_per_element(q) * (0.5 + slack)).all()


@law
@given(weights(), schemes)
def test_zero_is_exact_and_codes_stay_in_the_grid(weight: Tensor, scheme: Scheme) -> None:
    weight[0, 0] = 0.0
    q = quantize(weight, scheme)
    assert not dequantize(q)[weight == 0].any()
    assert q.codes.dtype == scheme.format.code_dtype
    assert torch.isin(q.codes.to(torch.int32), scheme.format.codes.to(torch.int32)).all()
    assert torch.isfinite(q.scale.float()).all()
    assert (q.scale.float() > 0).all()
    assert torch.isfinite(dequantize(q)).all()


# A float16 scale of e5m2 is a subnormal number for weights of this size, and those do not double exactly.
EXACT_SCALES = [
    s for s in SCHEMES.values() if not (s.scale_format is ScaleFormat.FLOAT16 and s.format.name == "fp8_e5m2")
]


@law
@given(weights(usual_weights), st.sampled_from(EXACT_SCALES), st.integers(0, 3))
def test_doubling_a_weight_doubles_the_scale_and_keeps_the_codes(weight: Tensor, scheme: Scheme, times: int) -> None:
    weight = torch.where(weight.abs() < 2.0**-4, 0.0, weight)
    once, doubled = quantize(weight, scheme), quantize(weight * 2.0**times, scheme)
    assert torch.equal(once.codes, doubled.codes)
    assert torch.equal(dequantize(doubled), dequantize(once) * 2.0**times)


@law
@given(
    weights(), st.sampled_from([s for s in SCHEMES.values() if str(s.granularity) in ("channel", "token", "g4", "g1")])
)
def test_permuted_rows_stay_permuted(weight: Tensor, scheme: Scheme) -> None:
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(len(weight)))
    q, permuted = quantize(weight, scheme), quantize(weight[order], scheme)
    zero_point = None if q.zero_point is None else q.zero_point[order]
    assert same(permuted, QTensor(q.codes[order], q.scale[order], zero_point, scheme))


@law
@given(
    weights(), st.sampled_from([s for s in SCHEMES.values() if str(s.granularity) in ("channel", "token", "tensor")])
)
def test_permuted_columns_stay_permuted_where_they_share_a_scale(weight: Tensor, scheme: Scheme) -> None:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    q, permuted = quantize(weight, scheme), quantize(weight[:, order], scheme)
    assert same(permuted, QTensor(q.codes[:, order], q.scale, q.zero_point, scheme))


@law
@given(weights(), schemes)
def test_rounding_what_was_rounded_changes_nothing(weight: Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    again = quantize(dequantize(q), scheme, scale=q.scale, zero_point=q.zero_point)
    assert torch.equal(dequantize(again), dequantize(q))


MIRRORED = [s for s in SCHEMES.values() if s.symmetric and torch.equal(values_of(s), -values_of(s).flip(0))]


@law
@given(weights(), st.sampled_from(MIRRORED))
def test_negated_weights_become_negated_values_where_the_values_mirror(weight: Tensor, scheme: Scheme) -> None:
    assert torch.equal(dequantize(quantize(-weight, scheme)), -dequantize(quantize(weight, scheme)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_scheme_of_a_format_keeps_its_promise_and_doubles_with_the_weight(fmt: str) -> None:
    """The laws above draw their schemes; here each one has its turn."""
    usual = normal(7, 10)
    usual = torch.where(usual.abs() < 2.0**-4, 0.0, usual)  # as above: no subnormal scales
    for scheme in [s for s in SCHEMES.values() if s.format.name == fmt]:
        # A tile of negative weights has no range, hence scale 1 before and after, where no code is negative.
        weight = usual.abs() if scheme.symmetric and scheme.format.minimum == 0 else usual
        q, doubled = quantize(weight, scheme), quantize(weight * 2, scheme)
        zeros = q.scale.float() == 1
        assert excess(weight, q) <= 0, str(scheme)
        if scheme in EXACT_SCALES:
            assert torch.equal(doubled.codes, q.codes), str(scheme)
            assert (zeros | (doubled.scale.double() == 2 * q.scale.double())).all(), str(scheme)
            assert torch.equal(dequantize(doubled), 2 * dequantize(q)), str(scheme)
        if scheme in MIRRORED:
            assert torch.equal(dequantize(quantize(-weight, scheme)), -dequantize(q)), str(scheme)


# --- against the definition, tile by tile


@EACH_SCHEME
def test_every_tile_is_rounded_as_if_it_were_alone(scheme: Scheme) -> None:
    """The tensor's tiles are cut here with plain loops, not with the library's own regions."""
    weight = normal(7, 10)
    q = quantize(weight, scheme)
    tile = scheme.granularity.tile((7, 10))
    alone = dataclasses.replace(scheme, granularity=PerTensor())
    for i in range(math.ceil(7 / tile[0])):
        for j in range(math.ceil(10 / tile[1])):
            part = (slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1]))
            expected = quantize(weight[part], alone)
            assert torch.equal(q.codes[part], expected.codes)
            assert q.scale[i, j].float() == expected.scale.float()
            assert q.zero_point is None or q.zero_point[i, j] == expected.zero_point


# --- edges


@EACH_SCHEME
def test_all_zero_groups_have_scale_one_and_decode_to_zero(scheme: Scheme) -> None:
    q = quantize(torch.zeros(6, 9), scheme)
    assert (q.scale.float() == 1).all()
    assert not dequantize(q).any()


@EACH_SCHEME
def test_a_tile_of_zeros_among_others_is_exact_and_changes_none_of_them(scheme: Scheme) -> None:
    """Block [0:6, 0:4] holds whole tiles of every granularity but those of the whole tensor."""
    weight = normal(12, 8)
    zeroed = weight.clone()
    zeroed[:6, :4] = 0.0
    before, after = dequantize(quantize(weight, scheme)), dequantize(quantize(zeroed, scheme))
    assert not after[:6, :4].any()
    within = (6 % scheme.granularity.tile((12, 8))[0], 4 % scheme.granularity.tile((12, 8))[1]) == (0, 0)
    if within:
        assert torch.equal(after[6:], before[6:])
        assert torch.equal(after[:6, 4:], before[:6, 4:])


@EACH_SCHEME
def test_an_outlier_costs_only_its_own_tile(scheme: Scheme) -> None:
    weight, tile = normal(12, 8), scheme.granularity.tile((12, 8))
    changed = weight.clone()
    changed[7, 5] = 1e6
    before, after = quantize(weight, scheme), quantize(changed, scheme)
    top, left = 7 // tile[0] * tile[0], 5 // tile[1] * tile[1]
    elsewhere = torch.ones(12, 8, dtype=torch.bool)
    elsewhere[top : top + tile[0], left : left + tile[1]] = False
    assert torch.equal(dequantize(after)[elsewhere], dequantize(before)[elsewhere])
    assert excess(changed, after) <= 0


@EACH_SCHEME
def test_subnormal_weights_beside_usual_ones_become_zero_or_keep_the_promise(scheme: Scheme) -> None:
    weight = normal(6, 9)
    weight[::2, ::2] = 1e-41
    weight[1::2, 1::2] = -1e-45
    q = quantize(weight, scheme)
    assert excess(weight, q) <= 0
    assert torch.isfinite(dequantize(q)).all()


@EACH_SCHEME
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1.5e-38, 1e37], ids=["1e-45", "1e-40", "1.5e-38", "1e37"])
def test_the_ends_of_float32_keep_the_promise(scheme: Scheme, magnitude: float) -> None:
    weight = normal(6, 9).clamp(-3, 3) * magnitude
    q = quantize(weight, scheme)
    assert excess(weight, q) <= 0
    assert torch.isfinite(dequantize(q)).all()


@EACH_SCHEME
@pytest.mark.parametrize("outlier", [1e3, 1e8, 1e30, -1e30], ids=str)
def test_one_huge_outlier_is_clipped_at_worst_to_the_largest_scale(scheme: Scheme, outlier: float) -> None:
    """1e8 overflows a float16 scale of most formats: the scale saturates and the outlier clips, the rest stays right."""
    weight = normal(6, 9)
    weight[3, 4] = outlier
    q = quantize(weight, scheme)
    assert excess(weight, q) <= 0
    assert torch.isfinite(q.scale.float()).all()


@EACH_SCHEME
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 7), (64, 65), (3, 0), (0, 3), (0, 0)], ids=str)
def test_odd_and_empty_shapes_keep_the_promise(scheme: Scheme, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    q = quantize(weight, scheme)
    assert q.shape == dequantize(q).shape == shape
    assert tuple(q.scale.shape) == scale_shape(shape, scheme.granularity)
    assert excess(weight, q) <= 0


@pytest.mark.parametrize("text", ["int8-channel", "int2-channel", "nf4-g4", "fp8_e4m3-channel", "uint4-channel-asym"])
def test_constant_rows_are_exact_to_an_ulp(text: str) -> None:
    """The only value is the largest one, which is a code; value * (x / value) is off by two roundings."""
    weight = torch.tensor([[3.0], [-0.7], [0.1]]).expand(3, 8).contiguous()
    x_hat = dequantize(quantize(weight, parse_scheme(text)))
    assert torch.allclose(x_hat, weight, rtol=2**-23, atol=0)


@EACH_SCHEME
@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 3, 4, 5)], ids=["3-D", "4-D"])
def test_tensors_of_more_dimensions_keep_the_promise(scheme: Scheme, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    q = quantize(weight, scheme)
    assert q.scale.ndim == len(shape)
    assert excess(weight, q) <= 0


@pytest.mark.parametrize("axis", range(-4, 4))
def test_any_axis_of_a_convolution_can_keep_its_channels(axis: int) -> None:
    weight = normal(4, 3, 5, 2)
    q = quantize(weight, Scheme(format=FORMATS["int8"], granularity=PerChannel(axis)))
    largest = weight.movedim(axis, 0).flatten(1).abs().amax(1)
    assert torch.equal(q.scale.flatten(), largest / 127)
    assert q.scale.shape[axis] == weight.shape[axis]


@pytest.mark.parametrize("axis", [-1, 0], ids=["columns", "rows"])
def test_the_tail_of_300_elements_in_groups_of_128_has_its_own_scale(axis: int) -> None:
    weight = normal(2, 300)
    weight[:, 256:] *= 1e-3
    q = quantize(weight if axis else weight.T, Scheme(format=FORMATS["int4"], granularity=PerGroup(128, axis)))
    scale = q.scale if axis else q.scale.T
    expected = torch.stack([weight[:, a:b].abs().amax(1) / 7 for a, b in ((0, 128), (128, 256), (256, 300))], dim=1)
    assert torch.equal(scale, expected)


def test_groups_along_the_first_axis_are_those_of_the_transposed_weight() -> None:
    weight = normal(300, 5)
    along_rows = quantize(weight, parse_scheme("int4-g128@0-asym"))
    transposed = quantize(weight.T.contiguous(), parse_scheme("int4-g128-asym"))
    assert torch.equal(along_rows.codes, transposed.codes.T)
    assert torch.equal(along_rows.scale, transposed.scale.T)


@EACH_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_input_gives_the_codes_of_the_same_float32_numbers(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = normal(6, 9).to(dtype)
    assert same(quantize(weight, scheme), quantize(weight.float(), scheme))


@EACH_SCHEME
def test_float64_input_keeps_the_promise(scheme: Scheme) -> None:
    weight = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert excess(weight, quantize(weight, scheme)) <= 0


def test_strided_weights_round_like_contiguous_ones() -> None:
    weight = normal(9, 12)
    for view in (weight.T, weight[::2, 1::3], weight[:1].expand(4, 12)):
        for text in ("int4-g4", "nf4-channel", "fp8_e4m3-b2x3", "int8-tensor-asym"):
            assert same(quantize(view, parse_scheme(text)), quantize(view.contiguous(), parse_scheme(text)))


def test_the_weight_is_not_changed() -> None:
    weight = normal(6, 9)
    before = weight.clone()
    for scheme in FEW_SCHEMES.values():
        quantize(weight, scheme)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@EACH_SCHEME
def test_what_is_not_finite_is_refused_with_its_count_and_first_place(scheme: Scheme, bad: float) -> None:
    weight = normal(6, 9)
    weight[2, 7], weight[5, 0] = bad, math.nan
    with pytest.raises(DataError, match=r"2 of 54 elements are NaN or infinite, the first is -?(nan|inf) at \[2, 7\]"):
        quantize(weight, scheme)


def test_a_scalar_has_one_scale() -> None:
    q = quantize(torch.tensor(-2.5), parse_scheme("int8-tensor"))
    assert q.scale.shape == ()
    assert dequantize(q).item() == pytest.approx(-2.5, rel=2**-22)


# --- scales that the caller gives


def test_given_scales_and_zero_points_are_used_as_they_are() -> None:
    weight = normal(4, 8)
    scheme = parse_scheme("uint4-channel-asym")
    scale, zero_point = torch.full((4, 1), 0.25), torch.full((4, 1), 5, dtype=torch.int32)
    q = quantize(weight, scheme, scale=scale, zero_point=zero_point)
    assert torch.equal(q.codes.int(), ((weight / 0.25).round() + 5).clamp(0, 15).int())


def test_given_scales_are_rounded_to_how_they_are_stored_before_codes_are_chosen() -> None:
    weight, scheme = normal(4, 8), parse_scheme("int8-channel-f16")
    q = quantize(weight, scheme, scale=torch.full((4, 1), 0.0101))
    assert torch.equal(q.scale, ScaleFormat.FLOAT16.round(torch.full((4, 1), 0.0101)))
    assert torch.equal(q.codes.int(), (weight / q.scale.float()).round().clamp(-128, 127).int())


def test_a_zero_point_without_its_scale_is_refused() -> None:
    with pytest.raises(SchemeError, match="without the scale it belongs to"):
        quantize(normal(2, 3), parse_scheme("int4-asym"), zero_point=torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.parametrize("bad", [0.0, -0.25, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("text", ["int4-channel", "nf4-channel-f16", "fp4_e2m1-channel-e8m0"])
def test_a_scale_that_is_not_positive_and_finite_is_refused(text: str, bad: float) -> None:
    scale = torch.full((4, 1), 0.25)
    scale[2] = bad
    with pytest.raises(DataError, match=r"1 of 4 scales are not positive and finite, the first is .* at \[2, 0\]"):
        quantize(normal(4, 8), parse_scheme(text), scale=scale)


def test_a_scale_of_another_shape_is_refused_before_it_broadcasts() -> None:
    with pytest.raises(SchemeError, match=r"scale has shape \[4\], but int4-channel on \[4, 4\] needs \[4, 1\]"):
        quantize(normal(4, 4), parse_scheme("int4"), scale=torch.ones(4))


@pytest.mark.parametrize(
    ("zero_point", "message"),
    [
        (torch.full((2, 1), 3.5), "zero_point is torch.float32; it is the code of 0.0"),
        (torch.tensor([[0], [16]]), "zero points from 0 to 16 are no codes of uint4, 0 to 15"),
        (torch.tensor([[-1], [3]]), "zero points from -1 to 3 are no codes"),
        (torch.zeros(2, dtype=torch.int32), r"zero_point has shape \[2\].*needs \[2, 1\]"),
    ],
    ids=["float", "above", "below", "shape"],
)
def test_a_zero_point_that_is_no_code_is_refused(zero_point: Tensor, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        quantize(normal(2, 3), parse_scheme("uint4-asym"), scale=torch.ones(2, 1), zero_point=zero_point)


def test_an_asymmetric_scheme_with_a_scale_but_no_zero_point_is_refused() -> None:
    with pytest.raises(SchemeError, match="zero point must be there exactly when"):
        quantize(normal(2, 3), parse_scheme("int4-asym"), scale=torch.ones(2, 1))


@pytest.mark.parametrize("estimator", [MinMax(), Percentile(90.0), MeanSquaredError()], ids=lambda e: type(e).__name__)
def test_the_estimator_is_asked_once_for_every_tile(estimator: MinMax | Percentile | MeanSquaredError) -> None:
    weight = normal(3, 300)
    scheme = parse_scheme("int4-g128")
    scale, _ = fit(weight, scheme, estimator)
    for column, part in enumerate((weight[:, :128], weight[:, 128:256], weight[:, 256:])):
        expected, _ = scheme.grid.params(*estimator(part, scheme.grid))
        assert torch.equal(scale[:, column], expected)


# --- what a QTensor refuses to be

GOOD = quantize(normal(4, 6), parse_scheme("int4-g4-asym-f16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": GOOD.scale[:, :1]}, r"scale has shape \[4, 1\].*needs \[4, 2\]"),
        ({"scale": GOOD.scale.float()}, "torch.float16"),
        ({"codes": GOOD.codes.to(torch.uint8)}, "torch.int8"),
        ({"zero_point": None}, "zero point must be there"),
        ({"zero_point": torch.zeros(4, 1)}, "differ in shape"),
    ],
    ids=["scale shape", "scale type", "code type", "no zero point", "zero point shape"],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        dataclasses.replace(GOOD, **change)


def test_a_symmetric_tensor_has_no_zero_point() -> None:
    q = quantize(normal(4, 6), parse_scheme("int4-g4"))
    with pytest.raises(SchemeError, match="zero point must be there exactly when the scheme is asymmetric"):
        dataclasses.replace(q, zero_point=torch.zeros(4, 2, dtype=torch.int32))


def test_bits_per_weight_counts_codes_scales_and_zero_points() -> None:
    assert GOOD.bits_per_weight == (24 * 4 + 8 * (16 + 4)) / 24
    assert GOOD.shape == (4, 6)


def test_moving_to_the_same_device_keeps_everything() -> None:
    assert same(GOOD.to("cpu"), GOOD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_gives_the_type_asked_for_with_one_rounding(dtype: torch.dtype) -> None:
    x_hat = dequantize(GOOD, dtype)
    assert GOOD.zero_point is not None
    codes = GOOD.codes.double() - GOOD.zero_point.double().repeat_interleave(4, 1)[:, :6]
    exact = codes * GOOD.scale.double().repeat_interleave(4, 1)[:, :6]
    assert x_hat.dtype == dtype
    # a code of 5 bits with its zero point times 11 bits of a float16 scale is exact in float32
    assert torch.equal(x_hat, exact.to(dtype))


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerChannel(), ()), (PerChannel(2), (3, 4)), (PerToken(), ()), (PerGroup(4), ()), (PerBlock(2, 2), (5,))],
    ids=str,
)
def test_a_granularity_that_does_not_fit_the_shape_is_refused(granularity: Granularity, shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemeError, match=rf"granularity {granularity}"):
        quantize(torch.ones(shape), Scheme(format=FORMATS["int8"], granularity=granularity))


@pytest.mark.parametrize("spelling", ["int4-g16-asym", "int8-channel", "int8-tensor", "int8-channel@1", "int8-b8x8"])
def test_rows_of_a_quantized_tensor_are_rows_of_what_it_stands_for(spelling: str) -> None:
    q = quantize(torch.randn(20, 40, generator=torch.Generator().manual_seed(0)), parse_scheme(spelling))
    assert torch.equal(dequantize(q.rows(8, 20)), dequantize(q)[8:20])


def test_rows_that_begin_inside_a_block_are_refused() -> None:
    q = quantize(torch.ones(20, 40), parse_scheme("int8-b8x8"))
    with pytest.raises(SchemeError, match="rows from 4 on begin inside a tile of 8 rows"):
        q.rows(4, 20)
