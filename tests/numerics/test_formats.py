"""Every code of every format, against a search over all values, torch's float8 and ml_dtypes."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat

FLOATS = {name: fmt for name, fmt in FORMATS.items() if isinstance(fmt, FloatFormat)}
TORCH_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PEERS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
ALL_FORMATS = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
ALL_FLOATS = pytest.mark.parametrize("fmt", FLOATS.values(), ids=FLOATS)

INF, NAN = math.inf, math.nan


def finite_values(fmt: Format) -> dict[int, float]:
    """Code to value, finite ones only; -0.0 left out, since no distance tells it from 0.0."""
    pairs = zip(fmt.codes.tolist(), fmt.decode(fmt.codes, torch.float64).tolist(), strict=True)
    return {code: value for code, value in pairs if math.isfinite(value) and str(value) != "-0.0"}


def around_midpoints(fmt: Format) -> Tensor:
    """float32: every value, every midpoint of neighbours, the float32 numbers on either side of all of them."""
    values = np.unique(np.array(list(finite_values(fmt).values())))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return torch.from_numpy(np.concatenate([points, np.nextafter(points, INF), np.nextafter(points, -INF)]))


def dense_sample(fmt: Format) -> Tensor:
    """float32, within the range: spread evenly, spread evenly in the exponent, and around all midpoints."""
    generator = torch.Generator().manual_seed(0)
    even = torch.linspace(fmt.minimum, fmt.maximum, 20001)
    exponents = torch.rand(20000, generator=generator) * 40 - 40
    small = fmt.maximum * exponents.exp2() * (torch.randint(0, 2, (20000,), generator=generator) * 2 - 1)
    return torch.cat([even, small, around_midpoints(fmt)]).clamp(fmt.minimum, fmt.maximum)


def all_bfloat16() -> Tensor:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    return bits.view(torch.bfloat16)


def bits_of(peer: type, x: Tensor) -> Tensor:
    return torch.from_numpy(x.float().numpy().astype(peer).view(np.uint8))


def assert_same_codes(x: Tensor, codes: Tensor, expected: Tensor) -> None:
    wrong = (codes != expected).nonzero().flatten()
    shown = [(x[i].item(), codes[i].item(), expected[i].item()) for i in wrong[:3]]
    assert not len(wrong), f"{len(wrong)} of {len(x)} differ; the first as (x, ours, theirs): {shown}"


# --- what the formats are


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_formats_hold_every_integer_of_their_width(bits: int) -> None:
    signed, unsigned = FORMATS[f"int{bits}"], FORMATS[f"uint{bits}"]
    assert signed.codes.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert unsigned.codes.tolist() == list(range(2**bits))
    assert signed.bits == unsigned.bits == bits
    assert (signed.code_dtype, unsigned.code_dtype) == (torch.int8, torch.uint8)


def test_ternary_holds_three_codes_in_two_bits() -> None:
    assert (FORMATS["ternary"].codes.tolist(), FORMATS["ternary"].bits) == ([-1, 0, 1], 2)


@pytest.mark.parametrize(
    ("name", "num_finite", "maximum", "smallest", "largest_exponent"),
    [
        ("fp8_e4m3", 254, 448.0, 2.0**-9, 8),
        ("fp8_e5m2", 248, 57344.0, 2.0**-16, 15),
        ("fp4_e2m1", 16, 6.0, 0.5, 2),
    ],
    ids=["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"],
)
def test_float_formats_hold_what_their_specification_lists(
    name: str, num_finite: int, maximum: float, smallest: float, largest_exponent: int
) -> None:
    """OFP8 1.0 table 1 and MX 1.0 table 5: counts of finite codes, largest and smallest positive value, emax."""
    fmt = FLOATS[name]
    values = fmt.decode(fmt.codes, torch.float64)
    assert len(fmt.codes) == 2**fmt.bits
    assert int(torch.isfinite(values).sum()) == num_finite
    assert (fmt.maximum, fmt.minimum, fmt.largest_exponent) == (maximum, -maximum, largest_exponent)
    assert values[torch.isfinite(values) & (values > 0)].min().item() == smallest
    assert int(torch.isinf(values).sum()) == (2 if name == "fp8_e5m2" else 0)


def test_fp4_holds_exactly_these_values() -> None:
    assert FORMATS["fp4_e2m1"].decode(torch.arange(8)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_nf4_has_sixteen_rising_values_from_minus_one_to_one_with_an_exact_zero() -> None:
    table = FORMATS["nf4"].decode(FORMATS["nf4"].codes, torch.float64)
    assert (len(table), table[0].item(), table[7].item(), table[15].item()) == (16, -1.0, 0.0, 1.0)
    assert (table.diff() > 0).all()
    assert torch.equal(table.float().double(), table), "the published constants are float32 numbers"


@ALL_FLOATS
def test_float_codes_stand_for_what_ml_dtypes_says(fmt: FloatFormat) -> None:
    theirs = torch.from_numpy(fmt.codes.numpy().view(PEERS[fmt.name]).astype(np.float64))
    ours = fmt.decode(fmt.codes, torch.float64)
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert torch.equal(ours.nan_to_num(nan=7.5), theirs.nan_to_num(nan=7.5))
    assert torch.equal(torch.signbit(ours)[~torch.isnan(ours)], torch.signbit(theirs)[~torch.isnan(ours)])


@pytest.mark.parametrize("name", TORCH_FLOAT8)
def test_float_codes_stand_for_what_torch_says(name: str) -> None:
    fmt = FLOATS[name]
    theirs = fmt.codes.view(TORCH_FLOAT8[name]).double()
    assert torch.equal(fmt.decode(fmt.codes, torch.float64).nan_to_num(nan=7.5), theirs.nan_to_num(nan=7.5))


# --- codes and values


@ALL_FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_finite_code_decodes_and_encodes_to_itself(fmt: Format, dtype: torch.dtype) -> None:
    values = fmt.decode(fmt.codes, dtype)
    finite = torch.isfinite(values)
    assert values.dtype == dtype
    codes = fmt.encode(values[finite])
    assert codes.dtype == fmt.code_dtype
    assert torch.equal(codes, fmt.codes[finite])


@ALL_FORMATS
def test_codes_are_unique_and_fit_their_width(fmt: Format) -> None:
    codes = fmt.codes.tolist()
    assert len(set(codes)) == len(codes) <= 2**fmt.bits
    assert max(codes) - min(codes) < 2**fmt.bits


@ALL_FORMATS
def test_minimum_and_maximum_are_the_ends_of_the_values(fmt: Format) -> None:
    values = finite_values(fmt).values()
    assert (min(values), max(values)) == (fmt.minimum, fmt.maximum)


@ALL_FORMATS
def test_encoding_keeps_order(fmt: Format) -> None:
    x = dense_sample(fmt).sort().values
    assert (fmt.decode(fmt.encode(x), torch.float64).diff() >= 0).all()


@ALL_FORMATS
def test_the_nearest_value_wins_and_ties_go_to_the_even_code(fmt: Format) -> None:
    code_of = {value: code for code, value in finite_values(fmt).items()}
    values = sorted(code_of)
    x = torch.cat([around_midpoints(fmt), torch.linspace(fmt.minimum * 1.2 - 1, fmt.maximum * 1.2 + 1, 501)])
    for number, code in zip(x.tolist(), fmt.encode(x).tolist(), strict=True):
        i = min(max(bisect.bisect(values, number), 1), len(values) - 1)
        below, above = values[i - 1], values[i]
        difference = Fraction(number) - Fraction(below) - (Fraction(above) - Fraction(number))  # exact
        even = below if code_of[below] % 2 == 0 else above
        expected = code_of[even if difference == 0 else below if difference < 0 else above]
        sign = 1 << (fmt.bits - 1)
        if isinstance(fmt, FloatFormat) and expected & ~sign == 0:
            expected = sign if math.copysign(1, number) < 0 else 0  # zeros keep their sign
        assert code == expected, f"{number!r} between {below} and {above} became {code}, not {expected}"


@ALL_FORMATS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_input_types_round_like_float32(fmt: Format, dtype: torch.dtype) -> None:
    x = dense_sample(fmt).to(dtype)
    assert torch.equal(fmt.encode(x), fmt.encode(x.float()))


@ALL_FORMATS
def test_float64_is_not_narrowed_before_rounding(fmt: Format) -> None:
    values = np.unique(np.array(list(finite_values(fmt).values())))
    middle = (values[1:] + values[:-1]) / 2
    for toward, neighbour in ((INF, values[1:]), (-INF, values[:-1])):
        x = torch.from_numpy(np.nextafter(middle, toward))
        assert torch.equal(fmt.decode(fmt.encode(x), torch.float64), torch.from_numpy(neighbour))


@ALL_FORMATS
def test_zero_is_exact_and_shapes_stay(fmt: Format) -> None:
    x = torch.zeros(2, 0, 3), torch.zeros(()), torch.zeros(2, 3, 4).transpose(0, 2)
    for zeros in x:
        codes = fmt.encode(zeros)
        assert codes.shape == zeros.shape
        assert not fmt.decode(codes).any()


# --- beyond the range, NaN, -0.0


@ALL_FORMATS
@pytest.mark.parametrize("factor", [1 + 2**-20, 1.03, 1.07, 2.0, 1e30, INF], ids=str)
def test_beyond_the_range_saturates(fmt: Format, factor: float) -> None:
    lowest = fmt.minimum * factor if fmt.minimum else -factor
    x = torch.tensor([lowest, fmt.maximum * factor])
    assert fmt.decode(fmt.encode(x), torch.float64).tolist() == [fmt.minimum, fmt.maximum]


@ALL_FORMATS
def test_nan_becomes_nan_or_is_refused(fmt: Format) -> None:
    x = torch.tensor([0.0, NAN, -NAN])
    if isinstance(fmt, FloatFormat) and fmt.nan_code is not None:
        assert torch.isnan(fmt.decode(fmt.encode(x))).tolist() == [False, True, True]
        return
    with pytest.raises(DataError, match=f"NaN cannot be a code of {fmt.name}"):
        fmt.encode(x)


@ALL_FLOATS
def test_negative_zero_keeps_its_sign_in_float_formats(fmt: FloatFormat) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert fmt.encode(x).tolist() == [0, 1 << (fmt.bits - 1)] * 2
    assert torch.signbit(fmt.decode(fmt.encode(x))).tolist() == [False, True, False, True]


# --- peers, bit for bit


@pytest.mark.parametrize("name", TORCH_FLOAT8)
def test_fp8_agrees_with_torch_on_every_bfloat16_in_range(name: str) -> None:
    fmt, x = FLOATS[name], all_bfloat16()
    x = x[torch.isnan(x) | (x.float().abs() <= fmt.maximum)]
    assert_same_codes(x, fmt.encode(x), x.to(TORCH_FLOAT8[name]).view(torch.uint8))


@ALL_FLOATS
def test_floats_agree_with_ml_dtypes_on_every_bfloat16_in_range(fmt: FloatFormat) -> None:
    x = all_bfloat16()
    x = x[x.float().abs() <= fmt.maximum]
    assert len(x) > 2**14
    assert_same_codes(x, fmt.encode(x), bits_of(PEERS[fmt.name], x))


@pytest.mark.parametrize("name", TORCH_FLOAT8)
def test_fp8_agrees_with_torch_on_float32_midpoints_and_their_neighbours(name: str) -> None:
    x = dense_sample(FLOATS[name])
    assert_same_codes(x, FLOATS[name].encode(x), x.to(TORCH_FLOAT8[name]).view(torch.uint8))


@ALL_FLOATS
def test_floats_agree_with_ml_dtypes_on_float32_midpoints_and_their_neighbours(fmt: FloatFormat) -> None:
    x = dense_sample(fmt)
    assert_same_codes(x, fmt.encode(x), bits_of(PEERS[fmt.name], x))


@pytest.mark.parametrize(
    ("name", "first_lost", "theirs"),
    [("fp8_e4m3", 464.0, NAN), ("fp8_e5m2", 61440.0, INF), ("fp4_e2m1", INF, 6.0)],
    ids=["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"],
)
def test_where_we_saturate_and_ml_dtypes_does_not(name: str, first_lost: float, theirs: float) -> None:
    """Past the midpoint to the value that would come next, ml_dtypes gives NaN or infinity; ours never does."""
    fmt, peer = FLOATS[name], PEERS[name]
    last_kept = np.nextafter(np.float32(first_lost), np.float32(0.0)) if math.isfinite(first_lost) else 3e38
    beyond = [np.nextafter(np.float32(first_lost), np.float32(INF)), 1e30, INF] if math.isfinite(first_lost) else [INF]
    x = torch.tensor([float(last_kept), *map(float, beyond)])
    assert fmt.decode(fmt.encode(x)).tolist() == [fmt.maximum] * len(x)
    peers = x.numpy().astype(peer).astype(np.float64).tolist()
    assert peers == pytest.approx([fmt.maximum] + [theirs] * len(beyond), nan_ok=True)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="torch changed its overflow rule between versions")
@pytest.mark.parametrize(("name", "theirs"), [("fp8_e4m3", 448.0), ("fp8_e5m2", INF)], ids=["fp8_e4m3", "fp8_e5m2"])
def test_where_we_saturate_torch_does_so_for_e4m3_only(name: str, theirs: float) -> None:
    x = torch.tensor([1e6, 1e30, INF])
    assert x.to(TORCH_FLOAT8[name]).float().tolist() == [theirs] * 3
    assert FLOATS[name].decode(FLOATS[name].encode(x)).tolist() == [FLOATS[name].maximum] * 3


# --- what cannot be a format


@pytest.mark.parametrize(("qmin", "qmax"), [(1, 3), (-3, 0), (-3, -1), (0, 256), (-128, 128)], ids=str)
def test_integer_codes_without_zero_or_a_positive_code_or_too_many_are_refused(qmin: int, qmax: int) -> None:
    with pytest.raises(SchemeError, match="must hold 0, a positive code and at most 256 codes"):
        IntegerFormat("odd", qmin, qmax)


@pytest.mark.parametrize(("qmin", "qmax", "bits"), [(-1, 1, 2), (0, 1, 1), (-2, 2, 3), (-127, 127, 8)], ids=str)
def test_the_width_of_a_code_follows_from_the_number_of_codes(qmin: int, qmax: int, bits: int) -> None:
    fmt = IntegerFormat("odd", qmin, qmax)
    assert fmt.bits == bits
    assert torch.equal(fmt.encode(fmt.decode(fmt.codes)), fmt.codes)


def test_a_table_of_any_length_encodes_its_own_values() -> None:
    fmt = TableFormat("odd", (-2.0, -0.3, 0.0, 0.1, 5.0))
    assert fmt.bits == 3
    assert torch.equal(fmt.encode(fmt.decode(fmt.codes)), fmt.codes)
