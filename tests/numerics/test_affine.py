"""The affine map: how ranges become scales and zero points, and what the codes then stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics import FORMATS, FloatFormat, Grid, IntegerFormat, ScaleFormat

INTEGERS = {name: fmt for name, fmt in FORMATS.items() if isinstance(fmt, IntegerFormat)}
ASYMMETRIC = {
    f"{name}-asym-{stored.value}": Grid(fmt, symmetric=False, scale_format=stored)
    for name, fmt in INTEGERS.items()
    for stored in (ScaleFormat.FLOAT32, ScaleFormat.FLOAT16, ScaleFormat.BFLOAT16)
}
SYMMETRIC = {
    f"{name}-{stored.value}": Grid(fmt, scale_format=stored) for name, fmt in FORMATS.items() for stored in ScaleFormat
}
EVERY = SYMMETRIC | ASYMMETRIC


def ranges() -> tuple[Tensor, Tensor]:
    """Random (minimum, maximum), one-sided ones and ones that leave out 0 among them; float32 [400] each."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(400, 2, generator=generator) * torch.rand(400, 1, generator=generator).mul(20).sub(10).exp2()
    return ends.amin(1), ends.amax(1)


@pytest.mark.parametrize("grid", SYMMETRIC.values(), ids=SYMMETRIC)
def test_a_symmetric_scale_is_the_largest_magnitude_over_the_largest_value_as_stored(grid: Grid) -> None:
    minimum, maximum = ranges()
    scale, zero_point = grid.params(minimum, maximum)
    largest = maximum.clamp(min=0) if grid.format.minimum == 0 else torch.maximum(-minimum, maximum).clamp(min=0)
    # MX 1.0 section 6.3 divides by the power of two of the largest value, not by the value itself.
    power_of_two = grid.scale_format is ScaleFormat.E8M0 and isinstance(grid.format, FloatFormat)
    unit = 2.0**grid.format.largest_exponent if power_of_two else grid.format.maximum  # type: ignore[union-attr] # a FloatFormat here
    exact = torch.where(largest > 0, largest / unit, 1.0)
    assert zero_point is None
    assert torch.equal(scale.float(), grid.scale_format.round(exact).float())


@pytest.mark.parametrize("grid", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_an_asymmetric_zero_point_is_a_code_and_decodes_to_an_exact_zero(grid: Grid) -> None:
    minimum, maximum = ranges()
    scale, zero_point = grid.params(minimum, maximum)
    assert zero_point is not None
    assert isinstance(grid.format, IntegerFormat)
    assert zero_point.dtype == torch.int32
    assert int(zero_point.min()) >= grid.format.qmin
    assert int(zero_point.max()) <= grid.format.qmax
    codes = grid.encode(torch.zeros(400), scale, zero_point)
    assert torch.equal(codes.to(torch.int32), zero_point)
    assert not grid.decode(codes, scale, zero_point).any()


@pytest.mark.parametrize("grid", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_both_ends_of_an_asymmetric_range_move_by_at_most_half_a_step(grid: Grid) -> None:
    """minimum / scale is off by 2**-23 of at most 255 steps twice, and the float32 step may be 2**-22 too small."""
    minimum, maximum = ranges()
    scale, zero_point = grid.params(minimum, maximum)
    for end in (minimum.clamp(max=0), maximum.clamp(min=0)):
        x_hat = grid.decode(grid.encode(end, scale, zero_point), scale, zero_point, torch.float64)
        assert ((x_hat - end.double()).abs() <= scale.double() * (0.5 + 4 * 255 * 2**-23)).all()


@pytest.mark.parametrize("grid", SYMMETRIC.values(), ids=SYMMETRIC)
def test_zero_is_exact_on_every_symmetric_grid(grid: Grid) -> None:
    scale, _ = grid.params(*ranges())
    assert not grid.decode(grid.encode(torch.zeros(400), scale, None), scale, None).any()


@pytest.mark.parametrize("grid", EVERY.values(), ids=EVERY)
def test_a_range_of_only_zero_has_scale_one(grid: Grid) -> None:
    scale, zero_point = grid.params(torch.zeros(3), torch.zeros(3))
    assert scale.float().tolist() == [1.0] * 3
    codes = grid.encode(torch.zeros(3), scale, zero_point)
    assert not grid.decode(codes, scale, zero_point).any()


def test_a_range_that_leaves_out_zero_is_widened_to_it() -> None:
    grid = Grid(FORMATS["uint8"], symmetric=False)
    scale, zero_point = grid.params(torch.tensor([51.0, -510.0]), torch.tensor([255.0, -51.0]))
    assert zero_point is not None
    assert scale.tolist() == [1.0, 2.0]
    assert zero_point.tolist() == [0, 255]


def test_a_hand_made_asymmetric_example() -> None:
    grid = Grid(FORMATS["int4"], symmetric=False)
    scale, zero_point = grid.params(torch.tensor(-1.0), torch.tensor(2.0))  # 3 / 15 = 0.2; -8 + 1 / 0.2 = -3
    assert zero_point is not None
    assert scale.item() == pytest.approx(0.2)
    assert zero_point.item() == -3
    codes = grid.encode(torch.tensor([-1.0, -0.31, 0.0, 0.09, 2.0, 9.0, -9.0]), scale, zero_point)
    assert codes.tolist() == [-8, -5, -3, -3, 7, 7, -8]


def test_ties_do_not_depend_on_the_zero_point() -> None:
    """Half to even is decided before the zero point is added: 0.5 and 2.5 steps go to 0 and 2 under odd ones too."""
    grid = Grid(FORMATS["uint8"], symmetric=False)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    for zero_point in (100, 101):
        codes = grid.encode(x, torch.ones(()), torch.tensor(zero_point)).to(torch.int32)
        assert (codes - zero_point).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("end", [3.4028235e38, 1e-45, 1e-38], ids=["max", "subnormal", "tiny"])
@pytest.mark.parametrize("name", ["int8", "uint4"])
def test_the_widest_and_the_narrowest_ranges_have_finite_scales(name: str, end: float) -> None:
    scale, zero_point = Grid(FORMATS[name], symmetric=False).params(torch.tensor([-end]), torch.tensor([end]))
    assert zero_point is not None
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    scale, _ = Grid(FORMATS[name]).params(torch.tensor([-end]), torch.tensor([end]))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_a_stored_scale_that_was_rounded_up_never_clips_the_largest_value(name: str) -> None:
    grid = Grid(FORMATS["int8"], scale_format=ScaleFormat(name))
    maximum = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.01
    scale, _ = grid.params(-maximum, maximum)
    # float32 is rounded to nearest: its quotient may be 2**-24 too small, a billionth of a step beyond the last code.
    assert (scale.double() * 127 >= maximum.double() * (1 - (2**-23 if name == "f32" else 0))).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_nan_is_refused_by_integer_grids(symmetric: bool) -> None:
    grid = Grid(FORMATS["int8"], symmetric)
    with pytest.raises(DataError, match="NaN cannot be a code of int8"):
        grid.encode(
            torch.tensor([0.0, torch.nan]), torch.ones(()), None if symmetric else torch.zeros((), dtype=torch.int32)
        )


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4"])
def test_only_integers_take_a_zero_point(name: str) -> None:
    with pytest.raises(SchemeError, match=f"{name} has no zero point"):
        Grid(FORMATS[name], symmetric=False)


def test_a_power_of_two_scale_takes_no_zero_point() -> None:
    with pytest.raises(SchemeError, match="use f32, f16 or bf16 scales"):
        Grid(FORMATS["int8"], symmetric=False, scale_format=ScaleFormat.E8M0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_decoding_computes_in_the_type_asked_for(dtype: torch.dtype) -> None:
    grid = Grid(FORMATS["int8"])
    x_hat = grid.decode(torch.tensor([3], dtype=torch.int8), torch.tensor([0.1], dtype=dtype), None, dtype)
    assert x_hat.dtype == dtype
    assert x_hat.item() == (torch.tensor(3, dtype=dtype) * torch.tensor(0.1, dtype=dtype)).item()


def test_the_widest_range_does_not_overflow_on_the_way_to_its_scale() -> None:
    end = torch.finfo(torch.float32).max
    scale, _ = Grid(FORMATS["uint8"], symmetric=False).params(torch.tensor([-end]), torch.tensor([end]))
    assert scale.double().item() == pytest.approx(2 * end / 255, rel=1e-6)
