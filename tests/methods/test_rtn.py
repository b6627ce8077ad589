"""Rounding to nearest is `tensor.quantize` under the name that recipes use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.methods import METHODS, rtn
from halfbin.numerics.affine import Grid
from halfbin.numerics.ranges import MinMax
from halfbin.tensor import parse_scheme, quantize


class HalfRange:
    """Covers half of the whole range, so that it cannot be taken for the default."""

    def __call__(self, tiles: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        minimum, maximum = MinMax()(tiles, grid)
        return minimum / 2, maximum / 2


@pytest.mark.parametrize("spelling", ["int4-g128", "int4-g32-asym-f16", "int8-channel", "fp8_e4m3-channel", "nf4-g64"])
def test_rtn_gives_the_codes_of_quantize(spelling: str) -> None:
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    scheme = parse_scheme(spelling)
    expected, found = quantize(weight, scheme), METHODS["rtn"](weight, scheme)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


def test_rtn_hands_the_estimator_on() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    scheme = parse_scheme("int4-g32")
    assert torch.equal(rtn(weight, scheme, estimator=HalfRange()).scale, rtn(weight, scheme).scale / 2)


def test_rtn_refuses_nan() -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = torch.nan
    with pytest.raises(DataError, match=r"\[1, 3\]"):
        rtn(weight, parse_scheme("int4-g32"))
