"""Quantized inputs: the integer product against the plain one, and LLM.int8() against the float product."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from halfbin.errors import DataError, SchemeError
from halfbin.nn import EXACT, LLMInt8Linear, QuantInputLinear, QuantLinear
from halfbin.nn.quant_inputs import refuses_integers
from halfbin.tensor import (
    FloatColumns,
    InputQuantizer,
    dequantize,
    parse_inputs,
    parse_scheme,
    quantize,
    take_columns,
)

U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
dtypes = pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(text: str) -> InputQuantizer:
    return parse_inputs(text).calibrated(-2.5, 3.0)


INPUTS = [
    "int8-token",
    "int8-tensor",
    "int8-tensor-dynamic",
    "int8-token-asym",
    "uint8-tensor-asym",
    "int4-token",
    "fp8_e4m3-token",
    "fp8_e4m3-tensor",
    "int8-token-outliers2",
]
WEIGHTS = ["int8-channel", "int4-g16", "int4-g16-asym-f16", "int8-tensor", "fp8_e4m3-channel", "nf4-g16"]
INTEGER = {"int8", "int4", "uint8"}


@dtypes
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("text", INPUTS)
def test_the_product_is_that_of_fake_quantized_inputs_and_dequantized_weights(
    text: str, weights: str, dtype: torch.dtype
) -> None:
    k, n = 72, 10
    q, x = quantize(normal(n, k, seed=1), parse_scheme(weights)), (normal(3, 4, k) * 2).to(dtype)
    bias = nn.Parameter(normal(n, seed=2).to(dtype))
    layer = QuantInputLinear(q, quantizer(text), bias)
    x_hat, w_hat = quantizer(text).fake_quantize(x), dequantize(q, dtype)
    plain = nn.functional.linear(x_hat, w_hat, bias)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (3, 4, n)
    integers = {text.split("-", maxsplit=1)[0], weights.split("-", maxsplit=1)[0]} <= INTEGER and "outliers" not in text
    assert (layer.refusal is None) == integers
    if not integers:
        assert torch.equal(y, plain)
        return
    v, groups = ROUNDOFF[dtype], 1 if q.scheme.group_size is None else math.ceil(k / 16)
    absolute = x_hat.double().abs() @ w_hat.double().abs().T + bias.double().abs()
    bound = (4 * v + (k + groups + 5) * U) * absolute * 1.05  # the terms of second order
    assert bool(((y.double() - plain.double()).abs() <= bound).all())


def test_the_integer_product_is_closer_to_the_exact_one_than_bfloat16_is() -> None:
    q, x = quantize(normal(10, 512, seed=1), parse_scheme("int8-channel")), normal(32, 512).to(torch.bfloat16)
    exact = dequantize(quantizer("int8-token").quantize(x), torch.float64) @ dequantize(q, torch.float64).T
    layer = QuantInputLinear(q, quantizer("int8-token"))
    plain = nn.functional.linear(quantizer("int8-token").fake_quantize(x), dequantize(q, torch.bfloat16))
    # One rounding to 8 bits, against two of every factor and one of the result.
    assert bool(((layer(x).double() - exact).abs() <= exact.abs() * (2.0**-8 + 4 * U)).all())
    assert float((layer(x).double() - exact).norm()) < 0.9 * float((plain.double() - exact).norm())


def test_float64_inputs_are_multiplied_in_float64() -> None:
    q, x = quantize(normal(6, 20, seed=1), parse_scheme("int8-channel")), normal(3, 20).double()
    layer = QuantInputLinear(q, quantizer("int8-token"))
    assert torch.equal(layer(x), quantizer("int8-token").fake_quantize(x) @ dequantize(q, torch.float64).T)


@pytest.mark.parametrize("text", INPUTS)
def test_an_empty_batch_gives_an_empty_result(text: str) -> None:
    layer = QuantInputLinear(quantize(normal(6, 20), parse_scheme("int8-channel")), quantizer(text))
    assert layer(torch.zeros(2, 0, 20)).shape == (2, 0, 6)


def test_a_cast_changes_no_scale_of_the_inputs_and_a_state_is_restored() -> None:
    q = quantize(normal(6, 20), parse_scheme("int8-channel"))
    layer = QuantInputLinear(q, quantizer("uint8-tensor-asym"), nn.Parameter(normal(6)))
    other = QuantInputLinear(q, parse_inputs("uint8-tensor-asym").calibrated(-1, 1), nn.Parameter(normal(6, seed=3)))
    scale = layer.quantizer.scale
    other.load_state_dict(layer.state_dict())
    x = normal(4, 20)
    assert torch.equal(other(x), layer(x))
    layer.to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16 == layer.dtype
    assert scale is not None and layer.quantizer.scale is not None
    assert torch.equal(layer.quantizer.scale, scale) and layer.quantizer.scale.dtype == torch.float32
    halves = QuantInputLinear(q, parse_inputs("uint8-tensor-asym-f16").calibrated(-1, 1), nn.Parameter(normal(6)))
    with pytest.raises(SchemeError, match=r"input_scale is torch.float32, but .* holds it as torch.float16"):
        halves.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("columns", "weights", "inputs", "reason"),
    [
        (131_071, "int8-channel", "int8-token", None),
        (131_072, "int8-channel", "int8-token", "sums over 131072 columns could reach 2147483648"),
        (131_072, "int8-g128", "int8-token", None),
        (40_000, "int8-channel-asym", "int8-token-asym", "more than INT32 holds"),
        (8, "nf4-g8", "int8-token", "nf4 codes are no integers"),
        (8, "int8-channel", "fp8_e4m3-token", "fp8_e4m3 codes are no integers"),
        (8, "int8-channel", "int8-token-outliers6", "LLMInt8Linear multiplies the rest"),
    ],
)
def test_why_codes_are_not_multiplied_as_integers(columns: int, weights: str, inputs: str, reason: str | None) -> None:
    found = refuses_integers(columns, parse_scheme(weights), parse_inputs(inputs))
    assert found is None if reason is None else found is not None and reason in found


# --- LLM.int8()


def planted(*shape: int, columns: tuple[int, ...] = (3, 17), factor: float = 100.0) -> Tensor:
    x = normal(*shape).clamp(-4, 4)
    x[..., list(columns)] *= factor
    return x


def float_bound(x: Tensor, weight: Tensor, layer: LLMInt8Linear) -> Tensor:
    """How far the layer may be from x @ weight^T: half a step of each factor that is rounded, and float32 sums.

    |x_hat w_hat - x w| <= |dx| |w| + |x| |dw| + |dx| |dw| for each column. dx = 0 where it is an outlier, or its weights are
    kept in 16 bits; then dw = u |w|, the rounding to that type, or 0 where the weight had it before.
    """
    left_out = (x.abs() >= layer.threshold).any(0)
    dw = (layer.scale.double() / 2).expand_as(weight).clone()
    if layer.columns is not None:
        kept = layer.columns.ids.long()
        left_out[kept] = True
        dw[:, kept] = weight[:, kept].abs() * ROUNDOFF[layer.columns.values.dtype]
    regular = torch.where(left_out, 0.0, x)
    dx = (regular.abs().amax(1, keepdim=True) / 127 / 2).expand_as(x) * ~left_out
    rounding = dx @ weight.abs().T + x.abs() @ dw.T + dx @ dw.T
    v = ROUNDOFF[layer.dtype]
    sums = (x.abs() @ weight.abs().T + rounding) * (v + (x.shape[1] + 7) * U)
    return (rounding + sums) * (1 + 1e-6)


def with_columns(weight: Tensor, *columns: int, dtype: torch.dtype = torch.float32) -> LLMInt8Linear:
    rest, kept = take_columns(weight, torch.tensor(columns), dtype)
    return LLMInt8Linear(quantize(rest, parse_scheme("int8-channel")), columns=kept, dtype=dtype)


@dtypes
@pytest.mark.parametrize(
    "columns", [(), (3, 17), (3,), (0, 3, 17, 63)], ids=["none kept", "both kept", "one kept", "more kept"]
)
def test_outliers_planted_at_100x_do_not_spoil_the_product(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    weight, x = normal(24, 64, seed=1).to(dtype), planted(40, 64).to(dtype)
    weight[:, [3, 17]] /= 64  # as a trained model makes up for its outliers; exact
    layer = LLMInt8Linear(quantize(weight, parse_scheme("int8-channel")), dtype=dtype)
    if columns:
        layer = with_columns(weight, *columns, dtype=dtype)
    exact = x.double() @ weight.double().T
    error = (layer(x).double() - exact).abs()
    assert layer(x).dtype == dtype
    assert bool((error <= float_bound(x.double(), weight.double(), layer)).all())


def test_small_weights_of_outliers_survive_only_in_columns_of_16_bits() -> None:
    weight, x = normal(24, 64, seed=1), planted(40, 64)
    weight[:, [3, 17]] /= 100
    exact = x.double() @ weight.double().T
    kept, rounded = (
        float((layer(x).double() - exact).norm() / exact.norm())
        for layer in (with_columns(weight, 3, 17), LLMInt8Linear(quantize(weight, parse_scheme("int8-channel"))))
    )
    # Steps of 3 / 127 are as large as the weights of the outliers' columns.
    assert kept < 0.02
    assert rounded > 5 * kept


def test_kept_columns_go_through_the_float_product_without_an_outlier_too() -> None:
    weight, x = normal(24, 64, seed=1), normal(5, 64).clamp(-5.9, 5.9)
    layer = with_columns(weight, 3, 17)
    assert layer.columns is not None
    rest = x.clone()
    rest[:, [3, 17]] = 0
    expected = QuantInputLinear(layer.qtensor, quantizer("int8-token"))(rest)
    assert torch.equal(layer._plainly(x), expected + x[:, [3, 17]] @ layer.columns.values.float().T)


def test_an_outlier_that_was_not_foreseen_is_dequantized() -> None:
    weight, x = normal(24, 64, seed=1), normal(5, 64).clamp(-5.9, 5.9)
    layer = with_columns(weight, 3)
    x[2, 17] = 80.0
    assert layer.columns is not None
    rest = x.clone()
    rest[:, [3, 17]] = 0
    expected = QuantInputLinear(layer.qtensor, quantizer("int8-token"))(rest)
    expected = expected + x[:, [3]] @ layer.columns.values.float().T
    expected = expected + x[:, [17]] @ dequantize(layer.qtensor)[:, [17]].T
    assert torch.equal(layer._plainly(x), expected)


def test_what_the_codes_say_of_kept_columns_is_not_looked_at() -> None:
    layer, x = with_columns(normal(24, 64, seed=1), 3, 17), planted(40, 64)
    before = layer(x)
    layer.codes[:, [3, 17]] = 77
    assert torch.equal(layer(x), before)


def test_kept_columns_are_part_of_the_weight_and_keep_their_type() -> None:
    weight = normal(24, 64, seed=1)
    layer = with_columns(weight, 3, 17)
    assert torch.equal(layer.weight[:, [3, 17]], weight[:, [3, 17]].half().float())
    assert str(layer).endswith("threshold=6, columns=2)")
    before = layer(planted(40, 64))
    state = layer.state_dict()
    assert {"column_ids", "column_values"} < set(state)
    other = with_columns(normal(24, 64, seed=5), 4, 18)
    other.load_state_dict(state)
    assert torch.equal(other(planted(40, 64)), before)
    cast = layer.to(torch.bfloat16)
    assert cast.column_values is not None and cast.column_values.dtype == torch.float16
    assert cast.weight.dtype == torch.bfloat16
    assert torch.equal(cast(planted(40, 64)), before)  # its inputs' type decides, not its own
    with pytest.raises(SchemeError, match="column_values is torch.bfloat16"):
        other.load_state_dict(state | {"column_values": state["column_values"].bfloat16()})


def test_columns_of_another_weight_are_refused() -> None:
    q = quantize(normal(4, 8), parse_scheme("int8-channel"))
    ids = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(SchemeError, match=r"columns \[5, 2\] are none of a weight"):
        LLMInt8Linear(q, columns=FloatColumns(ids, torch.ones(5, 2)))
    with pytest.raises(SchemeError, match="here it is \\[out, in\\]"):
        LLMInt8Linear(q, columns=FloatColumns(ids, torch.ones(2, 8), axis=0))


def test_outliers_no_longer_set_the_step_of_the_other_columns() -> None:
    q, x = quantize(normal(24, 64, seed=1), parse_scheme("int8-channel")), planted(40, 64)
    outliers = x[:, [3, 17]].double() @ dequantize(q).double()[:, [3, 17]].T
    x[:, [3, 17]] = 0
    truth = x.double() @ dequantize(q).double().T
    split, whole = (
        float((layer(planted(40, 64)).double() - outliers - truth).norm() / truth.norm())
        for layer in (LLMInt8Linear(q), QuantInputLinear(q, quantizer("int8-token")))
    )
    # Steps of |x| <= 4 over 127 against steps of |x| <= 400 over 127: about 1 % and about 60 % of a standard normal.
    assert split < 0.02
    assert whole > 0.2


def test_without_outliers_it_is_exactly_w8a8_per_token() -> None:
    q, x = quantize(normal(24, 64, seed=1), parse_scheme("int8-channel")), normal(5, 40, 64).clamp(-5.9, 5.9)
    bias = nn.Parameter(normal(24, seed=2))
    for threshold in (6.0, math.inf):
        assert torch.equal(
            LLMInt8Linear(q, bias, threshold=threshold)(x), QuantInputLinear(q, quantizer("int8-token"), bias)(x)
        )
    x[0, 0, 0] = 600.0
    assert torch.equal(
        LLMInt8Linear(q, bias, threshold=math.inf)(x), QuantInputLinear(q, quantizer("int8-token"), bias)(x)
    )
    assert not torch.equal(LLMInt8Linear(q, bias)(x), QuantInputLinear(q, quantizer("int8-token"), bias)(x))


@pytest.mark.parametrize("threshold", [0.0, 6.0], ids=str)
def test_when_all_columns_are_outliers_only_the_weights_are_rounded(threshold: float) -> None:
    q = quantize(normal(24, 64, seed=1), parse_scheme("int8-channel"))
    x = normal(40, 64) if threshold == 0 else 6 + normal(40, 64).abs()
    bias = nn.Parameter(normal(24, seed=2))
    # Both sum the same 64 float32 products; in which order is the library's business.
    bound = 2 * (64 + 2) * U * (x.abs() @ dequantize(q).abs().T + bias.abs())
    difference = LLMInt8Linear(q, bias, threshold=threshold)(x) - QuantLinear(q, bias, kernels=EXACT)(x)
    assert bool((difference.abs() <= bound).all())


@pytest.mark.parametrize("columns", [(), (3, 40)], ids=["none kept", "two kept"])
@pytest.mark.parametrize("weights", ["int8-channel", "int8-channel-asym", "int4-token-f16"])
def test_it_is_the_fake_quantized_product_with_outlier_columns_kept(weights: str, columns: tuple[int, ...]) -> None:
    weight, x = normal(24, 64, seed=1), planted(40, 64)
    how = quantizer("int8-token-outliers6")
    layer = LLMInt8Linear(quantize(weight, parse_scheme(weights)))
    if columns:
        rest, kept = take_columns(weight, torch.tensor(columns), torch.float32)
        layer = LLMInt8Linear(quantize(rest, parse_scheme(weights)), columns=kept)
        how = how.keeping(kept.ids)
    plain = how.fake_quantize(x).double() @ layer.weight.double().T
    bound = (64 + 9) * U * (x.double().abs() @ layer.weight.double().abs().T)
    assert bool(((layer(x).double() - plain).abs() <= bound).all())


def test_a_column_is_an_outlier_for_the_whole_batch_or_not_at_all() -> None:
    q, x = quantize(normal(4, 8, seed=1), parse_scheme("int8-channel")), normal(2, 8).clamp(-4, 4)
    layer = LLMInt8Linear(q)
    alone = layer(x[:1])
    x[1, 5] = 6.0  # equal to the threshold
    together = layer(x)
    assert not torch.equal(together[:1], alone)
    kept = x.clone()
    kept[:, 5] = 0
    without = QuantInputLinear(q, quantizer("int8-token"))(kept) + x[:, 5:6] @ dequantize(q)[:, 5:6].T
    assert torch.equal(together, without)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0, math.inf], ids=str)
def test_shapes_are_kept_also_without_a_token(shape: tuple[int, ...], threshold: float) -> None:
    layer = LLMInt8Linear(quantize(normal(24, 64), parse_scheme("int8-channel")), threshold=threshold)
    assert layer(normal(*shape)).shape == (*shape[:-1], 24)


def test_what_it_cannot_hold_is_refused() -> None:
    def make(text: str, threshold: float = 6.0) -> LLMInt8Linear:
        return LLMInt8Linear(quantize(normal(4, 8), parse_scheme(text)), threshold=threshold)

    with pytest.raises(SchemeError, match="one scale for each weight row, got int8-g4: use int8-channel"):
        make("int8-g4")
    with pytest.raises(SchemeError, match="fp8_e4m3 codes are no integers: use int8-channel"):
        make("fp8_e4m3-channel")
    for threshold in (-1.0, math.nan):
        with pytest.raises(SchemeError, match="must be 0 or more"):
            make("int8-channel", threshold)
    for bad in (math.nan, math.inf):
        x = normal(2, 8)
        x[1, 3] = bad
        with pytest.raises(DataError, match="1 of 16 elements"):
            make("int8-channel")(x)


def test_casting_it_changes_what_it_says_it_is_and_no_scale() -> None:
    layer = LLMInt8Linear(quantize(normal(4, 8), parse_scheme("int8-channel")), nn.Parameter(normal(4)))
    scale = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16 and torch.equal(layer.scale, scale)
    assert "threshold=6" in repr(layer)
