"""The compiled loops, each instruction set by name, give the bits of the plain code; their sums are those of the definition."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbin.kernels import rounding
from halfbin.kernels.errors import error_sums, error_sums_in_pieces
from halfbin.kernels.instruction_sets import BEST_FIRST, PORTABLE, best, usable
from halfbin.kernels.packed_rounding import fit_round_and_pack_rows
from halfbin.numerics import FORMATS, IntegerFormat
from halfbin.numerics.ranges import MeanSquaredError
from halfbin.packing import pack
from halfbin.tensor import Scheme, parse_scheme
from halfbin.tensor.qtensor import fit_plainly, quantize_plainly
from halfbin.tensor.rowwise import encoder, fit_rule

EVERY_SET = pytest.mark.parametrize("instruction_set", usable())
SYMMETRIC = [f"{name}-g{size}{scale}" for name in FORMATS for size, scale in ((17, ""), (16, "-f16"), (5, "-bf16"))]
ASYMMETRIC = [
    f"{name}-g{size}-asym{scale}"
    for name, fmt in FORMATS.items()
    if isinstance(fmt, IntegerFormat)
    for size, scale in ((17, ""), (16, "-f16"), (5, "-bf16"))
]
POWERS = ["fp4_e2m1-g32-e8m0", "fp8_e4m3-g32-e8m0", "fp8_e5m2-g32-e8m0", "int8-g32-e8m0", "uint4-g32-e8m0"]


def numbers(num_rows: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Heavy tails, exact ties, zeros of both signs, subnormals, rows of zeros, one huge outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, n, generator=generator) ** 3
    flat = x.flatten()
    flat[::5] = (flat[::5] * 2).round() / 2
    flat[::11] = -0.0
    flat[3::13] *= 1e-41
    flat[-1:] = 6e4
    x = flat.view(num_rows, n)
    x[num_rows // 2 : num_rows // 2 + 1, : n // 2] = 0.0
    return x.to(dtype)


def assert_plain(x: Tensor, scheme: Scheme, size: int, instruction_set: str) -> None:
    """Fitted codes, scales and zero points are those of the plain code, and so are codes under half of those scales."""
    plain = quantize_plainly(x, scheme)
    found = rounding.fit_and_round_rows(
        x, size, fit_rule(scheme), encoder(scheme.format), instruction_set=instruction_set
    )
    assert found is not None
    codes, scale, zero_point = found
    assert torch.equal(scale.float(), plain.scale.float().view(scale.shape))
    assert torch.equal(codes.view(scheme.format.code_dtype), plain.codes)
    assert (zero_point is None) == (plain.zero_point is None)
    if zero_point is not None and plain.zero_point is not None:
        assert torch.equal(zero_point, plain.zero_point.view(scale.shape))
    half = scheme.scale_format.round(plain.scale.float() * 0.5)  # what the larger half of a tile is clipped under
    expected = quantize_plainly(x, scheme, scale=half, zero_point=plain.zero_point)
    given_scale = half.float().view(scale.shape)
    codes = rounding.round_rows(
        x, given_scale, zero_point, size, encoder(scheme.format), instruction_set=instruction_set
    )
    assert torch.equal(codes.view(scheme.format.code_dtype), expected.codes)


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", [*SYMMETRIC, *ASYMMETRIC, *POWERS])
def test_every_format_and_scale_gives_the_bits_of_the_plain_code(
    spelling: str, dtype: torch.dtype, instruction_set: str
) -> None:
    scheme = parse_scheme(spelling)
    assert scheme.group_size is not None
    assert_plain(numbers(5, 75, dtype), scheme, scheme.group_size, instruction_set)


@EVERY_SET
@pytest.mark.parametrize("spelling", ["int4-g{}", "int5-g{}-asym-f16", "nf4-g{}", "fp8_e5m2-g{}"])
def test_every_length_and_group_up_to_40_gives_the_bits_of_the_plain_code(spelling: str, instruction_set: str) -> None:
    for size in (1, 2, 15, 16, 17, 33, 40):
        for n in (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 39, 40):
            assert_plain(numbers(2, n, seed=n), parse_scheme(spelling.format(size)), size, instruction_set)


@EVERY_SET
@pytest.mark.parametrize(
    "spelling", ["int4-g70000", "int4-g70000-asym-bf16", "fp8_e4m3-g80000", "nf4-g64", "int3-g100"]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_and_rows_that_are_cut_into_parts_give_the_bits_of_the_plain_code(
    spelling: str, threads: int, instruction_set: str
) -> None:
    scheme, before = parse_scheme(spelling), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert scheme.group_size is not None
        assert_plain(numbers(2, 150_001), scheme, scheme.group_size, instruction_set)
    finally:
        torch.set_num_threads(before)


@EVERY_SET
@pytest.mark.parametrize("magnitude", [2.0**-140, 1e-38, 1e-30, 1e-19, 1e-10, 1.0, 1e10, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("spelling", ["int8-channel", "int4-channel-asym", "fp8_e5m2-channel-bf16", "nf4-channel-f16"])
def test_every_magnitude_gives_the_bits_of_the_plain_code(
    spelling: str, magnitude: float, instruction_set: str
) -> None:
    x = (torch.rand(4, 300, generator=torch.Generator().manual_seed(1)) - 0.4) * magnitude
    assert_plain(x, parse_scheme(spelling), 300, instruction_set)


@EVERY_SET
@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_around_every_tie_are_rounded_as_the_division_says(name: str, instruction_set: str) -> None:
    """A quotient that is wrong in its last bit moves a code only here: within a few units of a tie."""
    fmt = FORMATS[name]
    values = fmt.decode(fmt.codes, torch.float64)
    values = torch.tensor(sorted(set(values[values.isfinite()].tolist())), dtype=torch.float64)
    ties = (values[1:] + values[:-1]) / 2
    scales = torch.rand(64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float32) + 0.5
    scales[:8, 0] = torch.tensor([1.0, 2.0**-126, 2.0**-70, 1.9999999, 1.0000001, 3.0, 2.0**70, 1e36])
    x = (ties * scales.double()).float()
    steps = [x]
    for towards in (-torch.inf, torch.inf):
        near = x
        for _ in range(3):
            near = torch.nextafter(near, torch.full_like(near, towards))
            steps.append(near)
    x = torch.cat(steps, dim=1)
    x = torch.where(x.isfinite(), x, 0.0)
    expected = fmt.encode(x / scales)
    codes = rounding.round_rows(x, scales, None, x.shape[1], encoder(fmt), instruction_set=instruction_set)
    assert torch.equal(codes.view(fmt.code_dtype), expected)


@given(st.data())
def test_any_finite_numbers_give_the_bits_of_the_plain_code(data: st.DataObject) -> None:
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    row = data.draw(st.lists(finite, min_size=1, max_size=40))
    spelling = data.draw(st.sampled_from(["int4-g7", "uint8-g16-asym", "fp8_e4m3-g9-bf16", "nf4-g40", "int8-g3-f16"]))
    scheme = parse_scheme(spelling)
    assert scheme.group_size is not None
    for name in usable():
        assert_plain(torch.tensor([row]), scheme, scheme.group_size, name)


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 300), (5, 7), (2, 133_001)], ids=str)
@pytest.mark.parametrize(
    "spelling",
    [
        "int4-g128",
        "uint4-g64-asym",
        "int4-g75-asym-f16",
        "int4-g66001",
        "nf4-g18-bf16",
        "fp4_e2m1-g32-e8m0",
        "ternary-g128",
        "int3-g32",
        "int5-g9",
        "uint6-g66001",
        "int8-g64",
    ],
)
def test_packed_and_compared_in_one_pass_are_the_codes_packed_and_compared(
    spelling: str, shape: tuple[int, int], dtype: torch.dtype, instruction_set: str
) -> None:
    x, scheme = numbers(*shape, dtype), parse_scheme(spelling)
    assert scheme.group_size is not None
    lowest = scheme.format.qmin if isinstance(scheme.format, IntegerFormat) else 0
    args = (x, scheme.group_size, fit_rule(scheme), encoder(scheme.format))
    pass_over = functools.partial(fit_round_and_pack_rows, *args, bits=scheme.format.bits, lowest=lowest)
    expected = rounding.fit_and_round_rows(*args)
    found = pass_over(instruction_set=instruction_set)
    assert expected is not None and found is not None
    codes, scale, zero_point = expected
    assert torch.equal(found.packed, pack(codes, scheme.format.bits, lowest=lowest))
    assert torch.equal(found.scale.float(), scale.float())
    assert (found.zero_point is None) == (zero_point is None)
    assert zero_point is None or (found.zero_point is not None and torch.equal(found.zero_point, zero_point))
    decode, coding = scheme.format.decode, encoder(scheme.format).format
    wide = scale.to(torch.float32)
    assert found.sums == error_sums(x, codes, wide, zero_point, args[1], decode=decode, code_format=coding)
    alone = pass_over(instruction_set=instruction_set, compare=False, row_bytes=found.packed.shape[1] + 3)
    assert alone is not None and alone.sums is None
    assert torch.equal(alone.packed[:, :-3], found.packed) and not alone.packed[:, -3:].any()
    x[0, -1] = math.inf
    assert pass_over(instruction_set=instruction_set) is None


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "spelling",
    [
        "int4-g32",
        "int4-g17-asym-f16",
        "uint4-g32",
        "int8-g75-asym",
        "nf4-g16-bf16",
        "fp8_e4m3-g20",
        "fp4_e2m1-g32-e8m0",
    ],
)
def test_the_range_with_the_least_error_is_the_one_that_the_plain_search_finds(
    spelling: str, dtype: torch.dtype, instruction_set: str
) -> None:
    scheme, estimator = parse_scheme(spelling), MeanSquaredError()
    assert scheme.group_size is not None
    x = numbers(40, 75, dtype)
    found = rounding.search_rows(
        x,
        scheme.group_size,
        fit_rule(scheme),
        encoder(scheme.format),
        estimator.factors,
        instruction_set=instruction_set,
    )
    assert found is not None
    scale, zero_point = scheme.grid.params(*found)
    expected_scale, expected_zero = fit_plainly(x, scheme, estimator)
    assert torch.equal(scale.float(), expected_scale.float())
    # A power of two is rounded down, so that shrinking a range further gains nothing here.
    assert torch.equal(scale.float(), fit_plainly(x, scheme)[0].float()) == spelling.endswith("e8m0")
    if zero_point is not None and expected_zero is not None:
        assert torch.equal(zero_point, expected_zero)
    x[3, 70] = math.nan
    coding = encoder(scheme.format)
    assert rounding.search_rows(x, scheme.group_size, fit_rule(scheme), coding, estimator.factors) is None


@EVERY_SET
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", ["int4-g20", "int4-g20-asym", "uint4-g90"])
def test_what_is_not_finite_is_seen_in_every_lane(
    spelling: str, dtype: torch.dtype, value: float, instruction_set: str
) -> None:
    scheme = parse_scheme(spelling)
    assert scheme.group_size is not None
    for place in range(90):
        x = torch.full((1, 90), 0.5, dtype=dtype)
        x[0, place] = value
        found = rounding.fit_and_round_rows(
            x, scheme.group_size, fit_rule(scheme), encoder(scheme.format), instruction_set=instruction_set
        )
        assert found is None, place


@pytest.mark.parametrize("spelling", ["int4-g32-asym", "int8-g700", "fp8_e4m3-g64", "nf4-g64", "fp4_e2m1-g32-e8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_are_the_same_bits_on_every_set_and_thread_and_those_of_the_definition(
    spelling: str, dtype: torch.dtype
) -> None:
    x, scheme = numbers(211, 700, dtype), parse_scheme(spelling)
    assert scheme.group_size is not None
    q, size = quantize_plainly(x, scheme), scheme.group_size
    scale, before = q.scale.float(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name in usable():
                sums = error_sums(
                    x,
                    q.codes,
                    scale,
                    q.zero_point,
                    size,
                    decode=scheme.format.decode,
                    code_format=encoder(scheme.format).format,
                    instruction_set=name,
                )
                found.append(sums)
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1
    twin = error_sums_in_pieces(x, q.codes, scale, q.zero_point, size, decode=scheme.format.decode)
    # Both add the same 147,700 float64 squares in other orders.
    assert found[0].signal == pytest.approx(twin.signal, rel=x.numel() * 2.0**-53)
    assert found[0].noise == pytest.approx(twin.noise, rel=x.numel() * 2.0**-53)
    assert found[0].max_abs == twin.max_abs


def test_a_scale_that_is_not_a_number_shows_in_the_sums() -> None:
    x = torch.ones(2, 20)
    coding = encoder(FORMATS["int4"])
    for name in usable():
        sums = error_sums(
            x,
            torch.ones(2, 20, dtype=torch.int8),
            torch.tensor([[1.0], [math.nan]]),
            None,
            20,
            decode=FORMATS["int4"].decode,
            code_format=coding.format,
            instruction_set=name,
        )
        assert math.isnan(sums.noise) and math.isnan(sums.max_abs)


def test_the_best_set_is_the_first_that_runs_here_and_the_portable_one_always_does() -> None:
    assert best() == usable()[0]
    assert usable()[-1] == PORTABLE
    assert [name for name in BEST_FIRST if name in usable()] == list(usable())


def test_a_set_that_is_not_built_is_refused() -> None:
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="instruction set"):
        rounding.round_rows(x, torch.ones(1, 1), None, 4, encoder(FORMATS["int4"]), instruction_set="mmx")
