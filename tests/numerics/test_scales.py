"""How scales are rounded to what a file holds: up for f16 and bf16, down for e8m0, never to zero or infinity."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.numerics import ScaleFormat

NARROW = pytest.mark.parametrize("stored", [ScaleFormat.FLOAT16, ScaleFormat.BFLOAT16], ids=["f16", "bf16"])
EVERY = pytest.mark.parametrize("stored", ScaleFormat, ids=[s.value for s in ScaleFormat])


def positive_scales() -> Tensor:
    """float32: 20001 numbers spread evenly in the exponent over all positive normal ones, and random bit patterns."""
    bits = torch.linspace(0x00800000, 0x7F7FFFFF, 20001, dtype=torch.float64).to(torch.int32)
    random = torch.randint(0x00800000, 0x7F800000, (20000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.cat([bits, random]).view(torch.float32)


def every_positive(dtype: torch.dtype) -> Tensor:
    """All positive finite numbers of a 16-bit type, in rising order, subnormals included."""
    values = torch.arange(1, 2**15, dtype=torch.int32).to(torch.uint16).view(dtype)
    return values[torch.isfinite(values)]


@EVERY
def test_a_stored_scale_is_finite_and_positive_whatever_comes_in(stored: ScaleFormat) -> None:
    scale = torch.cat([positive_scales(), torch.tensor([1e-45, 1e-40, 3.4028235e38])])
    for x in (scale, scale.double() * 1e-200, scale.double() * 1e200):
        result = stored.round(x)
        assert result.dtype == stored.dtype
        assert torch.isfinite(result.float()).all()
        assert (result.float() > 0).all()


@EVERY
def test_stored_scales_stay_as_they_are(stored: ScaleFormat) -> None:
    exact = {
        ScaleFormat.FLOAT32: positive_scales(),
        ScaleFormat.FLOAT16: every_positive(torch.float16),
        ScaleFormat.BFLOAT16: every_positive(torch.bfloat16)[0x7F:],  # from the smallest normal number on
        ScaleFormat.E8M0: torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }[stored]
    assert torch.equal(stored.round(exact.double()).double(), exact.double())


@NARROW
def test_a_narrow_scale_is_the_smallest_number_that_is_not_below(stored: ScaleFormat) -> None:
    table = every_positive(stored.dtype).double()
    if stored is ScaleFormat.BFLOAT16:
        table = table[0x7F:]
    neighbours = torch.cat([table, table * (1 + 2.0**-40), table * (1 - 2.0**-40), (table[1:] + table[:-1]) / 2])
    for scale in (positive_scales().double(), neighbours, neighbours.float().double()):
        expected = table[torch.searchsorted(table, scale).clamp(max=len(table) - 1)]
        assert torch.equal(stored.round(scale).double(), expected)


@NARROW
def test_float32_scales_round_up_like_float64_ones(stored: ScaleFormat) -> None:
    scale = positive_scales()
    assert torch.equal(stored.round(scale), stored.round(scale.double()))


@pytest.mark.parametrize(
    ("stored", "least", "most"),
    [
        (ScaleFormat.FLOAT32, 2.0**-126, 3.4028234663852886e38),
        (ScaleFormat.FLOAT16, 2.0**-24, 65504.0),
        (ScaleFormat.BFLOAT16, 2.0**-126, 3.3895313892515355e38),
        (ScaleFormat.E8M0, 2.0**-127, 2.0**127),
    ],
    ids=["f32", "f16", "bf16", "e8m0"],
)
def test_scales_beyond_the_range_saturate_at_its_ends(stored: ScaleFormat, least: float, most: float) -> None:
    beyond = torch.tensor([1e-300, 1e-45, 3.4028235e38, 1e300], dtype=torch.float64)
    assert stored.round(beyond).double().tolist() == [least, least, most, most]


def test_a_power_of_two_scale_is_rounded_down() -> None:
    for exponent in range(-126, 128):
        at, below = 2.0**exponent, np.nextafter(np.float64(2.0**exponent), 0.0)
        scale = torch.tensor([at, at * 1.999, below], dtype=torch.float64)
        assert ScaleFormat.E8M0.round(scale).double().tolist() == [at, at, 2.0 ** (exponent - 1)]


def test_powers_of_two_are_the_bytes_that_torch_and_ml_dtypes_store() -> None:
    """Only where the cast is exact: both peers round other numbers to nearest, the MX specification rounds down."""
    scale = torch.tensor([2.0**exponent for exponent in range(-126, 128)])
    ours = ScaleFormat.E8M0.round(scale).view(torch.uint8)
    assert ours.tolist() == list(range(1, 255))
    assert torch.equal(ours, scale.to(torch.float8_e8m0fnu).view(torch.uint8))
    assert torch.equal(ours, torch.from_numpy(scale.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)))


def test_where_we_round_down_and_the_peers_to_nearest() -> None:
    scale = torch.tensor([1.75])
    assert ScaleFormat.E8M0.round(scale).float().item() == 1.0
    assert scale.to(torch.float8_e8m0fnu).float().item() == 2.0
    assert float(np.float32(1.75).astype(ml_dtypes.float8_e8m0fnu)) == 2.0


def test_subnormal_float32_scales_become_the_smallest_power_of_two() -> None:
    scale = torch.tensor([2.0**-127, 2.0**-128, 1e-45])
    assert ScaleFormat.E8M0.round(scale).double().tolist() == [2.0**-127] * 3


@EVERY
def test_a_scale_format_is_found_by_its_stored_type(stored: ScaleFormat) -> None:
    assert ScaleFormat.of(stored.dtype) is stored
    assert stored.bits == {"f32": 32, "f16": 16, "bf16": 16, "e8m0": 8}[stored.value]


def test_a_type_that_holds_no_scales_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"scales cannot be stored as torch\.int8; expected one of"):
        ScaleFormat.of(torch.int8)
