"""Integer products: exact in INT32 up to the last K that fits, refused beyond, and scaled with few roundings."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics import FORMATS, IntegerFormat
from halfbin.tensor import QTensor, Scheme, accumulator_bound, dequantize, int_matmul, parse_scheme, quantize, spread
from halfbin.tensor.int_matmul import INT32_MAX, accumulate, product, product_in_float64

law = settings(max_examples=200, deadline=None, derandomize=True, database=None)
INTEGERS = {name: fmt for name, fmt in FORMATS.items() if isinstance(fmt, IntegerFormat)}

X_SCHEMES = [
    f"{fmt}-{granularity}{zero}"
    for fmt, granularity, zero in itertools.product(("int8", "uint8", "int4"), ("token", "tensor"), ("", "-asym"))
] + ["int8-channel-bf16", "int8-g64-asym", "int8-b2x64"]
W_SCHEMES = [
    f"{fmt}-{granularity}{zero}"
    for fmt, granularity, zero in itertools.product(
        ("int8", "uint4", "ternary"), ("channel", "tensor", "g4", "g5", "b2x3"), ("", "-asym")
    )
] + ["int4-g4-f16", "int4-g4-asym-bf16", "int4-g4-e8m0"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: QTensor, w: QTensor) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """x_hat @ w_hat^T, and the same with absolute values of each group's term, in rational numbers."""

    def centred(q: QTensor) -> list[list[int]]:
        zero = torch.tensor(0) if q.zero_point is None else spread(q.zero_point, q.shape, q.scheme.granularity)
        rows: list[list[int]] = (q.codes.long() - zero).expand(q.shape).tolist()
        return rows

    def scales(q: QTensor) -> list[list[Fraction]]:
        wide = spread(q.scale.double(), q.shape, q.scheme.granularity).expand(q.shape).tolist()
        return [[Fraction(s) for s in row] for row in wide]

    size = max(w.scheme.granularity.tile(w.shape)[1], 1)
    signed, absolute = [], []
    for q, s in zip(centred(x), scales(x), strict=True):
        signed.append([Fraction(0)] * w.shape[0])
        absolute.append([Fraction(0)] * w.shape[0])
        for n, (p, t) in enumerate(zip(centred(w), scales(w), strict=True)):
            for start in range(0, len(p), size):
                part = slice(start, start + size)
                term = sum(a * b for a, b in zip(q[part], p[part], strict=True)) * t[start] * s[0]
                signed[-1][n] += term
                absolute[-1][n] += abs(term)
    return signed, absolute


# --- the product


@law
@given(
    st.sampled_from(X_SCHEMES),
    st.sampled_from(W_SCHEMES),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 13),
    st.integers(0, 99),
)
def test_the_product_is_the_exact_one_to_a_few_roundings(
    x_text: str, w_text: str, m: int, n: int, k: int, seed: int
) -> None:
    x = quantize(normal(m, k, seed=seed) + 0.5, parse_scheme(x_text))
    w = quantize(normal(n, k, seed=seed + 100), parse_scheme(w_text))
    got = int_matmul(x, w)
    assert (got.dtype, tuple(got.shape)) == (torch.float32, (m, n))
    signed, absolute = exact(x, w)
    # conversion, w's scale, x's scale, and one addition for each group but the first; a little for second order
    roundings = w.scale.shape[1] + 2
    for i, j in itertools.product(range(m), range(n)):
        error = abs(Fraction(got[i, j].item()) - signed[i][j])
        assert error <= roundings * Fraction(1001, 1000) * Fraction(1, 2**24) * absolute[i][j]


@pytest.mark.parametrize("w_text", W_SCHEMES)
@pytest.mark.parametrize("x_text", X_SCHEMES)
def test_the_product_is_that_of_the_dequantized_tensors(x_text: str, w_text: str) -> None:
    x, w = quantize(normal(6, 37), parse_scheme(x_text)), quantize(normal(5, 37, seed=1), parse_scheme(w_text))
    x_hat, w_hat = dequantize(x, torch.float64), dequantize(w, torch.float64)
    # 13 groups at most, and the bound of each is at most the product of absolute values
    slack = 16 * 2.0**-24 * (x_hat.abs() @ w_hat.abs().T)
    assert ((int_matmul(x, w).double() - x_hat @ w_hat.T).abs() <= slack).all()


def test_with_power_of_two_scales_the_product_is_exact() -> None:
    """Sums below 2**24 are float32 numbers, so nothing is rounded at all."""
    x_scheme, w_scheme = parse_scheme("uint8-token-asym"), parse_scheme("int4-g16-asym")
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(7, 1)
    x = QTensor(
        torch.randint(0, 256, (7, 64), generator=generator, dtype=torch.uint8),
        ones * 0.125,
        torch.randint(0, 256, (7, 1), generator=generator, dtype=torch.int32),
        x_scheme,
    )
    w = QTensor(
        torch.randint(-8, 8, (3, 64), generator=generator, dtype=torch.int8),
        torch.full((3, 4), 2.0),
        torch.randint(-8, 8, (3, 4), generator=generator, dtype=torch.int32),
        w_scheme,
    )
    assert torch.equal(int_matmul(x, w).double(), dequantize(x, torch.float64) @ dequantize(w, torch.float64).T)


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((2, 4), (0, 4)), ((2, 0), (3, 0)), ((0, 0), (0, 0))], ids=str)
@pytest.mark.parametrize("w_text", ["int8-channel", "int8-tensor-asym", "int8-g2-asym", "int8-b2x2"])
@pytest.mark.parametrize("x_text", ["int8-token-asym", "uint8-tensor"])
def test_empty_operands_give_zeros(x_text: str, w_text: str, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    x, w = (quantize(torch.ones(s), parse_scheme(t)) for s, t in zip(shapes, (x_text, w_text), strict=True))
    got = int_matmul(x, w)
    assert torch.equal(got, torch.zeros(shapes[0][0], shapes[1][0]))


# --- the bound


def worst(fmt: IntegerFormat, zero: int | None) -> list[int]:
    """Codes of one row that make either |code| or |code - zero_point| largest, with both signs."""
    return sorted({fmt.qmin, fmt.qmax} | ({zero} if zero is not None else set()))


def held(x: Tensor, w: Tensor, x_zero: int, w_zero: int) -> list[int]:
    """All integers that `accumulate` holds for one row of x and one of w: its order, in Python's own integers."""
    q, p, k = x.tolist(), w.tolist(), len(x)
    dot, x_sum, w_sum = sum(a * b for a, b in zip(q, p, strict=True)), sum(q), sum(p)
    first = dot - w_zero * x_sum
    centred = w_sum - k * w_zero
    return [dot, x_sum, w_sum, w_zero * x_sum, k * w_zero, first, centred, x_zero * centred, first - x_zero * centred]


@pytest.mark.parametrize("x_name", INTEGERS)
def test_no_integer_on_the_way_exceeds_the_bound_and_one_attains_it(x_name: str) -> None:
    """For each pair of formats and the zero points at the ends and in the middle: all rows of the worst codes."""
    x_format, k = INTEGERS[x_name], 3
    for w_format in INTEGERS.values():
        zeros = [[None, f.qmin, (f.qmin + f.qmax) // 2, f.qmax] for f in (x_format, w_format)]
        for x_zero, w_zero in itertools.product(*zeros):
            bound = accumulator_bound(
                k,
                x_format,
                w_format,
                x_zero_points=None if x_zero is None else (x_zero, x_zero),
                w_zero_points=None if w_zero is None else (w_zero, w_zero),
            )
            reached = [
                abs(value)
                for a, b in itertools.product(worst(x_format, x_zero), worst(w_format, w_zero))
                for value in held(torch.full((k,), a), torch.full((k,), b), x_zero or 0, w_zero or 0)
            ]
            assert max(reached) == bound


SMALL = [fmt for fmt in INTEGERS.values() if fmt.bits <= 4]


@pytest.mark.parametrize("asymmetric", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("w_format", SMALL, ids=lambda f: f.name)
@pytest.mark.parametrize("x_format", SMALL, ids=lambda f: f.name)
def test_the_bound_is_the_largest_term_that_any_codes_and_zero_points_reach(
    x_format: IntegerFormat, w_format: IntegerFormat, asymmetric: tuple[bool, bool]
) -> None:
    ranges = [range(f.qmin, f.qmax + 1) for f in (x_format, w_format)]
    zeros = [r if a else [0] for r, a in zip(ranges, asymmetric, strict=True)]
    worst_term = 0
    for z, y in itertools.product(*zeros):
        for q, p in itertools.product(*ranges):
            terms = (q * p, y * q, q * (p - y), z * (p - y), (q - z) * (p - y))
            worst_term = max(worst_term, *(abs(term) for term in terms))
    bounds = [(f.qmin, f.qmax) if a else None for f, a in zip((x_format, w_format), asymmetric, strict=True)]
    bound = accumulator_bound(10, x_format, w_format, x_zero_points=bounds[0], w_zero_points=bounds[1])
    assert bound == 10 * worst_term


@law
@given(st.sampled_from(list(INTEGERS.values())), st.sampled_from(list(INTEGERS.values())), st.data())
def test_no_codes_exceed_the_bound(x_format: IntegerFormat, w_format: IntegerFormat, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 6))
    codes = [
        torch.tensor(data.draw(st.lists(st.integers(f.qmin, f.qmax), min_size=k, max_size=k)))
        for f in (x_format, w_format)
    ]
    x_zero, w_zero = (data.draw(st.integers(f.qmin, f.qmax)) for f in (x_format, w_format))
    bound = accumulator_bound(k, x_format, w_format, x_zero_points=(x_zero, x_zero), w_zero_points=(w_zero, w_zero))
    values = held(codes[0], codes[1], x_zero, w_zero)
    assert max(abs(value) for value in values) <= bound
    zeros = (torch.tensor([[z]], dtype=torch.int32) for z in (x_zero, w_zero))
    assert accumulate(codes[0][None], codes[1][None], *zeros).item() == values[-1]


@pytest.mark.parametrize(
    ("x", "w", "zero_points", "largest"),
    [
        ("int8", "int8", {}, 131071),
        ("int8", "int4", {}, 2097151),
        ("uint8", "int8", {"x_zero_points": (0, 255)}, 65793),
        ("uint8", "uint8", {"x_zero_points": (0, 255), "w_zero_points": (0, 255)}, 33025),
        ("int8", "int8", {"x_zero_points": (-128, 127), "w_zero_points": (-128, 127)}, 33025),
        ("uint8", "uint8", {"x_zero_points": (128, 128), "w_zero_points": (128, 128)}, 33025),
        ("int8", "int8", {"x_zero_points": (0, 0), "w_zero_points": (0, 0)}, 131071),
    ],
    ids=["int8", "w4a8", "asymmetric x", "uint8 both", "int8 both", "uint8 centred", "int8 centred"],
)
def test_the_largest_k_of_usual_products(x: str, w: str, zero_points: dict[str, Any], largest: int) -> None:
    one = accumulator_bound(1, INTEGERS[x], INTEGERS[w], **zero_points)
    assert INT32_MAX // one == largest
    assert accumulator_bound(largest, INTEGERS[x], INTEGERS[w], **zero_points) <= INT32_MAX
    assert accumulator_bound(largest + 1, INTEGERS[x], INTEGERS[w], **zero_points) > INT32_MAX


def constant(scheme: Scheme, codes: list[int], zero: int | None, k: int) -> QTensor:
    """Rows of one code each, scale 1, all with the same zero point."""
    rows = torch.tensor(codes).to(scheme.format.code_dtype).unsqueeze(1).expand(-1, k).contiguous()
    scale = torch.ones(len(codes), 1)
    return QTensor(rows, scale, None if zero is None else torch.full_like(scale, zero, dtype=torch.int32), scheme)


@pytest.mark.parametrize(
    ("x_text", "x_zero", "w_text", "w_zero", "largest"),
    [
        ("int8-token", None, "int8-channel", None, 131071),
        ("uint8-token-asym", 0, "int8-channel", None, 65793),
        ("uint8-token-asym", 255, "uint8-channel-asym", 255, 33025),
        ("uint8-token-asym", 128, "uint8-channel-asym", 128, 33025),
        ("int8-token-asym", -128, "int8-channel-asym", 127, 33025),
    ],
    ids=["symmetric", "x from zero", "both below zero", "centred", "opposite"],
)
def test_the_worst_codes_are_exact_at_the_largest_k_and_refused_one_above(
    x_text: str, x_zero: int | None, w_text: str, w_zero: int | None, largest: int
) -> None:
    schemes = parse_scheme(x_text), parse_scheme(w_text)
    formats = [INTEGERS[s.format.name] for s in schemes]
    x_codes, w_codes = worst(formats[0], x_zero), worst(formats[1], w_zero)
    x, w = constant(schemes[0], x_codes, x_zero, largest), constant(schemes[1], w_codes, w_zero, largest)
    wanted = [[largest * (a - (x_zero or 0)) * (b - (w_zero or 0)) for b in w_codes] for a in x_codes]
    zeros = (None if q.zero_point is None else q.zero_point for q in (x, w))
    assert accumulate(x.codes, w.codes, *zeros).tolist() == wanted
    assert torch.equal(int_matmul(x, w), torch.tensor(wanted, dtype=torch.int32).to(torch.float32))

    above = [
        constant(s, c, z, largest + 1) for s, c, z in ((schemes[0], x_codes, x_zero), (schemes[1], w_codes, w_zero))
    ]
    overflow = [
        abs(value)
        for a, b in itertools.product(x_codes, w_codes)
        for value in held(torch.full((largest + 1,), a), torch.full((largest + 1,), b), x_zero or 0, w_zero or 0)
    ]
    assert max(overflow) > INT32_MAX
    with pytest.raises(
        SchemeError,
        match=rf"sums over {largest + 1} products of .* can reach {max(overflow)}, and INT32 ends at 2147483647: at most "
        rf"{largest} fit. Split K into parts of at most {largest}",
    ):
        int_matmul(*above)


def test_groups_of_w_are_bounded_by_their_own_size() -> None:
    x, k = parse_scheme("int8-token"), 131072
    rows = constant(x, [-128, 127], None, k)
    w = torch.full((1, k), -128, dtype=torch.int8)
    grouped = QTensor(w, torch.ones(1, 2), None, parse_scheme("int8-g65536"))
    assert int_matmul(rows, grouped).tolist() == [[2.0**31], [-127.0 * 128 * k]]
    with pytest.raises(SchemeError, match="can reach 2147483648"):
        int_matmul(rows, QTensor(w, torch.ones(1, 1), None, parse_scheme("int8-g131072")))


# --- what is refused


@pytest.mark.parametrize(
    ("x_text", "w_text", "shapes", "message"),
    [
        ("fp8_e4m3-token", "int8", ((2, 4), (3, 4)), "the codes of fp8_e4m3-token are no integers"),
        ("int8-token", "nf4-g4", ((2, 4), (3, 4)), "the codes of nf4-g4 are no integers"),
        ("int8-token", "int8", ((2, 4), (3, 5)), r"x is \[2, 4\] and w \[3, 5\]; expected \[M, K\] and \[N, K\]"),
        ("int8-token", "int8", ((2, 2, 4), (3, 4)), r"x is \[2, 2, 4\].*flatten x's leading"),
        ("int8-g2", "int8", ((2, 4), (3, 4)), r"x has 2 scales in each row of 4 \(int8-g2\)"),
        ("int8-channel@1", "int8", ((2, 4), (3, 4)), "x has 4 scales in each row"),
    ],
    ids=["float x", "table w", "K differs", "3-D x", "grouped x", "column scales"],
)
def test_operands_that_do_not_fit_are_refused(
    x_text: str, w_text: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str
) -> None:
    x, w = (quantize(torch.ones(s), parse_scheme(t)) for s, t in zip(shapes, (x_text, w_text), strict=True))
    with pytest.raises(SchemeError, match=message):
        int_matmul(x, w)


@pytest.mark.parametrize("zero_points", [(-1, 3), (0, 256), (5, 4)], ids=str)
def test_zero_points_that_are_no_codes_have_no_bound(zero_points: tuple[int, int]) -> None:
    with pytest.raises(SchemeError, match="are no codes of uint8, 0 to 255"):
        accumulator_bound(4, INTEGERS["uint8"], INTEGERS["int8"], x_zero_points=zero_points)


def test_the_product_for_devices_without_integer_products_is_the_same() -> None:
    worst = torch.full((2, INT32_MAX // 128**2), -128, dtype=torch.int8)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, (n, 300), dtype=torch.int8, generator=generator) for n in (5, 7))
    for a, b in ((worst, worst), (x, w), (x[:0], w)):
        assert torch.equal(product_in_float64(a, b), product(a, b))
