"""Inputs rounded on the device: INT8 products to the bit, FP8 products against float64 and a bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels.triton.quantized_inputs import SMALLEST, Range, linear, quantize
from halfbin.kernels.triton.tiles import cut
from kernels.triton.where import DEVICE, UNIT, only_where_kernels_run

only_where_kernels_run()
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
INT8, FLOAT8 = Range(), Range(float8=True)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(m * 31 + k)) * 3).to(dtype)


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1009 + k)
    codes = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    return codes, torch.rand(n, generator=generator) * 0.02 + 1e-3


def scales(x: Tensor, largest: float) -> Tensor:
    """Of finite tokens: the largest |x| over the largest code, 1 for zeros, no subnormals. float32 [m, 1]."""
    scale = x.float().abs().amax(1, keepdim=True) / largest
    return torch.where(scale > 0, scale, 1.0).clamp(min=SMALLEST)


def plain(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, to: Range, static: Tensor | None = None
) -> Tensor:
    """The sum at the top of device/quantized_inputs.py, operation by operation."""
    step = scales(x, to.high) if static is None else static
    s = (x.float() / step).round().clamp(to.low, to.high)
    total = s.long() @ codes.long().T
    assert int(total.abs().max()) < 2**31
    y = total.float() * scale * step
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype)


def check(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, to: Range = INT8, static: Tensor | None = None
) -> None:
    given = [None if t is None else t.to(DEVICE) for t in (x, codes, scale, bias, static)]
    y = linear(given[0], given[1], given[2], given[3], to, given[4]).cpu()  # type: ignore[arg-type]  # three are there
    expected = plain(x, codes, scale, bias, to, static)
    assert y.dtype == x.dtype
    wrong = y != expected
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {y.numel()} differ, first at {wrong.nonzero()[0].tolist()}"


TAILS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130)
SHAPES = [
    pytest.param([(n, 40, 2) for n in TAILS], id="rows"),
    pytest.param([(3, k, 2) for k in range(1, 131)], id="columns"),
    pytest.param([(3, k, 17) for k in TAILS], id="columns-of-many-tokens"),
    pytest.param([(3, 40, m) for m in TAILS], id="tokens"),
    pytest.param([(n, k, m) for n in (1, 2, 3) for k in (1, 2, 3) for m in (1, 2, 3)], id="tiny"),
    pytest.param([(70, 2100, 2), (300, 200, 40), (200, 300, 129)], id="large"),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_tail_of_every_dimension(shapes: list[tuple[int, int, int]]) -> None:
    for n, k, m in shapes:
        check(inputs(m, k), *weight(n, k), torch.linspace(-1, 1, n))


@dtypes
@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["dynamic", "static"])
@pytest.mark.parametrize("to", [INT8, Range(-8, 7), Range(-127, 127)], ids=str)
def test_types_ranges_and_scales(to: Range, static: Tensor | None, dtype: torch.dtype) -> None:
    for m in (1, 20):
        check(inputs(m, 300, dtype), *weight(70, 300), torch.linspace(-1, 1, 70).to(dtype), to, static)


def test_columns_are_split_and_a_bias_may_be_a_view_with_strides() -> None:
    assert cut(2, 70, 3000, 3000).splits > 8
    for m in (2, 20):
        check(inputs(m, 3000), *weight(70, 3000), torch.linspace(-1, 1, 140)[::2])


@pytest.mark.parametrize("low, high", [(-128, -128), (127, 127), (-128, 127)])
def test_extreme_codes_on_both_sides_saturate_nothing(low: int, high: int) -> None:
    k = 1024
    for codes in ([-128, -128], [127, 127], [-128, 127]):
        w = torch.tensor(codes, dtype=torch.int8).repeat(8, k // 2)
        x = torch.tensor([float(low), float(high)]).repeat(20, k // 2)
        for m in (1, 20):
            check(x[:m], w, torch.ones(8), static=torch.ones(1))


def test_sums_above_float32s_integers_are_exact_until_they_are_rounded_once() -> None:
    k = 2048
    w, x = torch.full((3, k), 127, dtype=torch.int8), torch.full((2, k), 127.0)
    x[0, :3], x[1, 7] = torch.tensor([1.0, 2.0, 3.0]), -128.0
    assert int((x.long() @ w.long().T).min()) > 2**24
    check(x, w, torch.ones(3), static=torch.ones(1))


def test_ties_go_to_the_even_code_on_both_sides_of_zero() -> None:
    x = torch.arange(-254, 255, dtype=torch.float32)[None, :] / 2
    codes, _ = quantize(x.to(DEVICE), INT8, torch.ones(1, device=DEVICE))
    assert torch.equal(codes.cpu().float(), x.round())


@pytest.mark.parametrize("to", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_zeros_outliers_and_subnormals(to: Range) -> None:
    x = inputs(5, 256)
    x[0] = 0
    x[1, 17] = 1e30
    x[2] = 1e-42
    x[3] *= 1e-38
    x[4, 100] = 3e38
    codes, scale = (t.cpu() for t in quantize(x.to(DEVICE), to))
    assert torch.equal(scale[:, None], scales(x, 448 if to.float8 else 127))
    steps = x / scale[:, None]
    assert torch.equal(codes.float(), steps.to(torch.float8_e4m3fn).float() if to.float8 else steps.round())


def test_every_float16_number_becomes_the_fp8_that_torch_rounds_it_to() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()].clamp(-448, 448)[None, :]
    codes, _ = quantize(x.to(DEVICE), FLOAT8, torch.ones(1, device=DEVICE))
    assert torch.equal(codes.cpu().view(torch.uint8), x.float().to(torch.float8_e4m3fn).view(torch.uint8))


def test_the_fp8_product_is_near() -> None:
    """Products of FP8 are exact in float32; k roundings of sums, three after them, and on Hopper 14 bits within a step."""
    step = 2.0**-13 if DEVICE.type == "cuda" else 0.0
    for n, k, m in ((3, 5, 1), (70, 300, 3), (65, 2000, 2), (130, 257, 70)):
        x, scale = inputs(m, k), torch.linspace(1e-3, 1e-2, n)
        patterns = torch.randn(n, k, generator=torch.Generator().manual_seed(k)).to(torch.float8_e4m3fn)
        given = [t.to(DEVICE) for t in (x, patterns.view(torch.uint8), scale)]
        y = linear(given[0], given[1], given[2], None, FLOAT8).cpu()
        codes, x_scale = (t.cpu() for t in quantize(given[0], FLOAT8))
        x_hat, w_hat = codes.double() * x_scale.double()[:, None], patterns.double() * scale.double()[:, None]
        bound = ((k + 3) * UNIT + step) * (x_hat.abs() @ w_hat.abs().T)
        assert bool(((y.double() - x_hat @ w_hat.T).abs() <= bound).all())


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["dynamic", "static"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("to", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_tokens_that_are_not_finite_are_refused(to: Range, bad: float, static: Tensor | None) -> None:
    x, (codes, scale) = inputs(5, 1500), weight(6, 1500)
    x[2, 1400] = bad
    codes = torch.zeros(6, 1500, dtype=torch.uint8) if to.float8 else codes
    given = [None if t is None else t.to(DEVICE) for t in (x, codes, scale, static)]
    with pytest.raises(DataError, match="1 of 5 tokens hold NaN or infinity"):
        linear(given[0], given[1], given[2], None, to, given[3])  # type: ignore[arg-type]  # three are there


def test_leading_dimensions_stay_and_empty_ones_too() -> None:
    x, (codes, scale) = inputs(6, 64).to(DEVICE), (t.to(DEVICE) for t in weight(5, 64))
    flat = linear(x, codes, scale, None, INT8)
    assert torch.equal(linear(x.view(2, 3, 64), codes, scale, None, INT8), flat.view(2, 3, 5))
    assert torch.equal(linear(x.T.contiguous().T, codes, scale, None, INT8), flat)
    assert torch.equal(linear(x[0], codes, scale, None, INT8), flat[0])
    assert linear(x[:0], codes, scale, None, INT8).shape == (0, 5)


def test_the_operator_has_a_fake_and_compilers_see_it() -> None:
    x, (codes, scale) = inputs(4, 96, torch.bfloat16).to(DEVICE), (t.to(DEVICE) for t in weight(7, 96))
    operator = torch.ops.halfbin.triton_quantized_inputs.default
    torch.library.opcheck(operator, (x, codes, scale, None, -128, 127, False, None))

    def double(x: Tensor) -> Tensor:
        return linear(x + x, codes, scale, None, INT8) * 0.5

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))
