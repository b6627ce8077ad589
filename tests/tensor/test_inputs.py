"""How a layer's inputs are quantized: spellings, and what is done to numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.tensor import (
    InputQuantizer,
    InputScheme,
    dequantize,
    outlier_columns,
    parse_inputs,
    parse_scheme,
    quantize,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SPELLINGS = [
    "".join(parts)
    for parts in itertools.product(
        ("int8", "int4", "uint8", "fp8_e4m3", "int6"), ("-token", "-tensor", "-tensor-dynamic"), ("", "-outliers6")
    )
    if parts[1:] != ("-tensor", "-outliers6")
] + [
    "int8-token-asym",
    "uint8-tensor-asym-f16",
    "int8-tensor-bf16-dynamic",
    "int8-token-outliers0.1",
    "int8-token-outliers0.00000025",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_is_read_and_written_back(text: str) -> None:
    assert str(parse_inputs(text)) == text
    assert parse_inputs(str(parse_inputs(text))) == parse_inputs(text)


def test_different_spellings_mean_different_things() -> None:
    assert len({parse_inputs(text) for text in SPELLINGS}) == len(SPELLINGS)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("int8-token-dynamic", "int8-token"),
        ("int8-dynamic-token", "int8-token"),
        ("int8-tensor-static", "int8-tensor"),
        ("int8-sym-tensor", "int8-tensor"),
        ("int8-outliers6.0-token", "int8-token-outliers6"),
    ],
)
def test_other_spellings_of_the_same(text: str, same: str) -> None:
    assert parse_inputs(text) == parse_inputs(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imt8-token", r"'imt8' in scheme 'imt8-token' is no format; did you mean 'int8'\?"),
        ("int8-tokn", r"'tokn' in inputs 'int8-tokn' is not understood; did you mean 'token'\?"),
        ("int8-tensor-dynamc", r"'dynamc' in inputs 'int8-tensor-dynamc' is not understood; did you mean 'dynamic'\?"),
        ("int8-token-outliers", r"'outliers' in inputs .* did you mean 'outliers6'\?"),
        ("int8-token-outliers-6", r"'outliers' in inputs"),
        ("int8-token-outliers0", r"outliers=0 must be above 0 and finite"),
        ("int8-tensor-outliers6", r"the rest dynamic, such as int8-token-outliers6"),
        ("int8", r"inputs 'int8' do not say which share a scale; did you mean 'int8-token' or 'int8-tensor'\?"),
        ("int8-dynamic", r"inputs 'int8-dynamic' do not say which share a scale"),
        ("int8-channel", r"inputs cannot be quantized per channel: .* use one a token \(int8-token\)"),
        ("int8-g128", r"inputs cannot be quantized per g128"),
        ("int8-b1x8", r"inputs cannot be quantized per b1x8"),
        ("mxfp8", r"inputs cannot be quantized per g32"),
        ("int8-token-static", r"int8-token cannot be static: nobody knows the tokens to come; use -tensor"),
        ("int8-dynamic-tensor-static", r"'static' in inputs .* a second time"),
        ("int8-token-outliers6-outliers7", r"'outliers7' in inputs .* a second time"),
        ("int8-token-tensor", r"'tensor' in scheme .* says a second time which weights share"),
        ("nf4-token-asym", r"nf4 has no zero point"),
        ("", r"'' in scheme '' is no format"),
    ],
    ids=lambda value: value if " " not in value and "\\" not in value else "",
)
def test_what_is_not_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse_inputs(text)


DYNAMIC = ["int8-token", "int4-token-asym", "fp8_e4m3-token", "int8-tensor-dynamic", "nf4-token", "int8-token-f16"]


@pytest.mark.parametrize("text", DYNAMIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (24,), (0, 24), (3, 0, 24), (2, 0)], ids=str)
def test_dynamic_inputs_are_quantized_row_by_row(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, inputs = normal(*shape).to(dtype), parse_inputs(text)
    rows = x.reshape(math.prod(shape[:-1]), shape[-1])
    expected = quantize(rows, inputs.scheme)
    quantizer = inputs.quantizer()
    assert torch.equal(quantizer.quantize(x).codes, expected.codes)
    assert torch.equal(quantizer.quantize(x).scale, expected.scale)
    x_hat = quantizer.fake_quantize(x)
    assert x_hat.dtype == dtype
    assert torch.equal(x_hat, dequantize(expected, dtype).reshape(shape))


def test_a_token_does_not_depend_on_the_others_in_its_batch() -> None:
    x, quantizer = normal(6, 16) * torch.logspace(-3, 3, 6)[:, None], parse_inputs("int8-token").quantizer()
    together = quantizer.fake_quantize(x)
    assert all(torch.equal(quantizer.fake_quantize(row), together[i]) for i, row in enumerate(x))


@pytest.mark.parametrize("text", ["int8-tensor", "uint8-tensor-asym", "fp8_e4m3-tensor", "int8-tensor-f16"])
def test_static_inputs_keep_their_scale_whatever_comes(text: str) -> None:
    quantizer = parse_inputs(text).calibrated(-1.0, 3.0)
    assert quantizer.scale is not None
    q = quantizer.quantize(normal(4, 10) * 100)
    assert torch.equal(q.scale, quantizer.scale.reshape(1, 1))
    x_hat = quantizer.fake_quantize(torch.tensor([[-1.0, 0.0, 3.0, 1e6, -1e6]]))
    step = float(quantizer.scale.float()) * (32 if "fp8" in text else 1)  # e4m3 between 256 and 448: steps of 32
    # Within the range half a step, one for the rounded zero point; beyond it the largest that the range holds.
    assert torch.allclose(x_hat[0, :4], torch.tensor([-1.0, 0.0, 3.0, 3.0]), rtol=0, atol=step)
    assert x_hat[0, 1] == 0.0
    low = -1.0 if "asym" in text else -3.0
    assert abs(float(x_hat[0, 4]) - low) <= 1.1 * step
    assert quantizer.fake_quantize(torch.zeros(0, 5)).shape == (0, 5)


def test_a_static_scheme_wants_its_scale_and_a_dynamic_one_none() -> None:
    one = torch.ones(1)
    with pytest.raises(SchemeError, match="int8-tensor is static and needs a scale from calibration; or use"):
        parse_inputs("int8-tensor").quantizer()
    with pytest.raises(SchemeError, match="needs a scale and a zero point"):
        parse_inputs("int8-tensor-asym").quantizer(one)
    with pytest.raises(SchemeError, match="needs a scale from"):
        parse_inputs("int8-tensor").quantizer(one, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(SchemeError, match="int8-token finds its scales itself"):
        parse_inputs("int8-token").quantizer(one)
    with pytest.raises(SchemeError, match=r"one scale and one zero point, got a scale of shape \[2\]"):
        parse_inputs("int8-tensor").quantizer(torch.ones(2))
    with pytest.raises(SchemeError, match="zero point 128 is no code of int8"):
        parse_inputs("int8-tensor-asym").quantizer(one, torch.tensor(128))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DataError, match="must be positive and finite"):
            parse_inputs("int8-tensor").quantizer(torch.tensor(bad))
    with pytest.raises(DataError, match="the inputs' range is nan to 1.0"):
        parse_inputs("int8-tensor").calibrated(math.nan, 1.0)


def test_calibrated_inputs_that_were_always_zero_have_a_scale() -> None:
    assert torch.equal(
        parse_inputs("int8-tensor").calibrated(0.0, 0.0).fake_quantize(torch.zeros(2, 3)), torch.zeros(2, 3)
    )


def test_outlier_columns_stay_and_no_longer_widen_the_others_steps() -> None:
    x = normal(2, 5, 32)
    x[1, 2, 7] = 600.0
    x[0, 0, 9] = -6.0
    quantizer = parse_inputs("int8-token-outliers6").quantizer()
    x_hat = quantizer.fake_quantize(x)
    kept = outlier_columns(x.reshape(-1, 32), 6.0)
    assert kept.nonzero()[:, 0].tolist() == [7, 9]
    assert torch.equal(x_hat[..., kept], x[..., kept])
    half_step = x[..., ~kept].abs().amax(-1, keepdim=True) / 127 / 2
    assert bool(((x_hat - x)[..., ~kept].abs() <= half_step * 1.0001).all())
    assert not torch.equal(x_hat[..., ~kept], x[..., ~kept])


@pytest.mark.parametrize("text", ["int8-token", "int8-token-outliers6"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_inputs_that_are_not_finite_are_refused(text: str, bad: float) -> None:
    with pytest.raises(DataError, match="1 of 4 elements are NaN"):
        parse_inputs(text).quantizer().fake_quantize(torch.tensor([[1.0, bad, 0.0, 1.0]]))


def test_a_number_is_no_input() -> None:
    with pytest.raises(SchemeError, match="a single number"):
        parse_inputs("int8-token").quantizer().fake_quantize(torch.tensor(1.0))


@pytest.mark.parametrize("text", ["int8-token", "int8-token-outliers2"])
def test_gradients_pass_straight_through(text: str) -> None:
    x = normal(3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(parse_inputs(text).quantizer().fake_quantize(x).sum(), x)
    assert torch.equal(gradient, torch.ones(3, 8))


def test_impossible_schemes_are_refused_at_birth() -> None:
    with pytest.raises(SchemeError, match="per g32"):
        InputScheme(scheme=parse_scheme("int8-g32"), dynamic=True)
    with pytest.raises(SchemeError, match="cannot be static"):
        InputScheme(scheme=parse_scheme("int8-token"), dynamic=False)


def test_named_columns_stay_whatever_they_hold() -> None:
    x = normal(6, 16)
    x[2, 5] = 50.0
    quantizer = parse_inputs("int8-token-outliers6").quantizer().keeping(torch.tensor([1, 5, 9], dtype=torch.int32))
    rest = x.clone()
    rest[:, [1, 5, 9]] = 0
    expected = parse_inputs("int8-token").quantizer().fake_quantize(rest)
    expected[:, [1, 5, 9]] = x[:, [1, 5, 9]]
    assert torch.equal(quantizer.fake_quantize(x), expected)
    assert not torch.equal(parse_inputs("int8-token-outliers6").quantizer().fake_quantize(x), expected)


def test_columns_are_named_only_where_outliers_are_left_out() -> None:
    columns = torch.tensor([1], dtype=torch.int32)
    plain = parse_inputs("int8-token").quantizer()
    assert plain.keeping(columns) is plain
    with pytest.raises(SchemeError, match="int8-token leaves no columns out"):
        InputQuantizer(parse_inputs("int8-token"), columns=columns)
    with pytest.raises(SchemeError, match="there is no input feature 16, there are 16"):
        parse_inputs("int8-token-outliers6").quantizer().keeping(torch.tensor([16])).fake_quantize(normal(2, 16))
