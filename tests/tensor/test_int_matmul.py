"""The integer product is exact, its bound is attained, and what INT32 could not hold is refused beforehand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics.formats import FORMATS, IntegerFormat
from halfbin.tensor import QTensor, accumulator_bound, dequantize, int_matmul, parse_scheme, quantize
from halfbin.tensor.int_matmul import INT32_MAX, accumulate

EPS = torch.finfo(torch.float32).eps


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("w_scheme", ["int8-channel", "int8-tensor", "int4-g32", "int4-g48-asym", "int8-channel-asym"])
@pytest.mark.parametrize("x_scheme", ["int8-token", "int8-tensor-asym", "uint8-token-asym", "int4-token"])
def test_the_product_is_that_of_the_dequantized_tensors(x_scheme: str, w_scheme: str) -> None:
    x, w = quantize(numbers(7, 160), parse_scheme(x_scheme)), quantize(numbers(5, 160, seed=1), parse_scheme(w_scheme))
    x_hat, w_hat = dequantize(x, torch.float64), dequantize(w, torch.float64)
    num_groups = w.scale.shape[1]
    # Each group's sum, its scale and the addition round once, x's scale once more: against the sum of magnitudes.
    bound = (num_groups + 2) * EPS * (x_hat.abs() @ w_hat.abs().T)
    found = int_matmul(x, w)
    assert found.dtype == torch.float32
    assert bool(((found - x_hat @ w_hat.T).abs() <= bound).all())


@pytest.mark.parametrize("w_zero", [None, -8, 7], ids=lambda z: f"w zero {z}")
@pytest.mark.parametrize("x_zero", [None, -128, 127, 3], ids=lambda z: f"x zero {z}")
def test_the_cross_terms_give_the_integers_exactly(x_zero: int | None, w_zero: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-128, 128, (6, 300), generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (9, 300), generator=generator).to(torch.int8)

    def column(zero: int | None, rows: int) -> Tensor | None:
        return None if zero is None else torch.full((rows, 1), zero, dtype=torch.int32)

    found = accumulate(x, w, column(x_zero, 6), column(w_zero, 9))
    expected = [
        [sum((q - (x_zero or 0)) * (p - (w_zero or 0)) for q, p in zip(a, b, strict=True)) for b in w.tolist()]
        for a in x.tolist()
    ]
    assert found.tolist() == expected


INTEGERS = [f for f in FORMATS.values() if isinstance(f, IntegerFormat) and f.bits <= 4]


@pytest.mark.parametrize("asymmetric", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("w_format", INTEGERS, ids=lambda f: f.name)
@pytest.mark.parametrize("x_format", INTEGERS, ids=lambda f: f.name)
def test_the_bound_is_the_largest_term_that_any_codes_and_zero_points_reach(
    x_format: IntegerFormat, w_format: IntegerFormat, asymmetric: tuple[bool, bool]
) -> None:
    ranges = [range(f.qmin, f.qmax + 1) for f in (x_format, w_format)]
    zeros = [r if a else [0] for r, a in zip(ranges, asymmetric, strict=True)]
    worst = 0
    for z, y in itertools.product(*zeros):
        for q, p in itertools.product(*ranges):
            worst = max(worst, abs(q * p), abs(y * q), abs(q * (p - y)), abs(z * (p - y)), abs((q - z) * (p - y)))
    bounds = [(f.qmin, f.qmax) if a else None for f, a in zip((x_format, w_format), asymmetric, strict=True)]
    assert accumulator_bound(10, x_format, w_format, x_zero_points=bounds[0], w_zero_points=bounds[1]) == 10 * worst


def extreme(rows: int, k: int) -> QTensor:
    """int8 codes of -128 everywhere."""
    codes = torch.full((rows, k), -128, dtype=torch.int8)
    return QTensor(codes, torch.ones(rows, 1), None, parse_scheme("int8-channel"))


def test_the_longest_sum_of_the_worst_codes_is_exact_and_one_more_is_refused() -> None:
    most = INT32_MAX // 128**2
    x, w = extreme(1, most), extreme(1, most)
    assert int(accumulate(x.codes, w.codes, None, None)) == most * 128**2 <= INT32_MAX
    assert int_matmul(x, w).item() == pytest.approx(most * 128**2, rel=EPS)
    with pytest.raises(SchemeError, match=rf"sums over {most + 1} products .* at most {most} fit. Split K"):
        int_matmul(extreme(1, most + 1), extreme(1, most + 1))


def test_groups_of_w_make_long_sums_possible() -> None:
    k = 2 * (INT32_MAX // 128**2)
    x = extreme(1, k)
    w = quantize(torch.full((1, k), -1.0), parse_scheme("int8-g1024"))
    expected = dequantize(x, torch.float64) @ dequantize(w, torch.float64).T
    assert int_matmul(x, w).item() == pytest.approx(expected.item(), rel=(w.scale.shape[1] + 2) * EPS)


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [
        pytest.param("int8-g16", "int8-channel", "x has 2 scales in each row of 32", id="x in groups"),
        pytest.param("fp8_e4m3-token", "int8-channel", "are no integers", id="x in floats"),
        pytest.param("int8-token", "nf4-channel", "are no integers", id="w in a table"),
    ],
)
def test_what_has_no_integer_product_is_refused(x: str, w: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        int_matmul(quantize(numbers(2, 32), parse_scheme(x)), quantize(numbers(3, 32), parse_scheme(w)))


def test_shapes_that_do_not_fit_are_named() -> None:
    x, w = quantize(numbers(2, 32), parse_scheme("int8-token")), quantize(numbers(3, 33), parse_scheme("int8-channel"))
    with pytest.raises(SchemeError, match=r"x is \[2, 32\] and w \[3, 33\]"):
        int_matmul(x, w)


def test_nothing_times_nothing_is_zero() -> None:
    x = quantize(torch.zeros(2, 0), parse_scheme("int8-token"))
    w = quantize(torch.zeros(3, 0), parse_scheme("int8-channel"))
    assert int_matmul(x, w).tolist() == [[0.0] * 3] * 2
