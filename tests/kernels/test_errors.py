"""The sums of the fast loops are those of the definition, in float64, whatever the size of the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from halfbin.evaluation.layers import TensorError, rounding_sums, weight_error
from halfbin.kernels import rounding
from halfbin.kernels.errors import ErrorSums
from halfbin.tensor import dequantize, parse_scheme, quantize


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30], ids=["of ordinary size", "tiny", "huge"])
@pytest.mark.parametrize(
    "spelling", ["int4-g128", "int4-g32-asym", "fp8_e4m3-channel", "nf4-g64", "int8-tensor", "mxfp4"]
)
def test_the_sums_are_those_of_the_definition(spelling: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * size
    q = quantize(weight, parse_scheme(spelling))
    expected = weight_error(weight, dequantize(q))
    for piece in (1, 1000, rounding.PIECE):
        monkeypatch.setattr(rounding, "PIECE", piece)
        found = TensorError.of(rounding_sums(weight, q))
        # The reconstruction and its difference to the weight are rounded to float32 here: each element of the noise is
        # off by eps of the weight, which is at most `eps / relative` of the noise.
        close = 4 * torch.finfo(torch.float32).eps / expected.relative
        assert found.relative == pytest.approx(expected.relative, rel=close)
        assert found.max_abs == pytest.approx(expected.max_abs, rel=close)


def test_sums_of_parts_add_up_and_nan_stays() -> None:
    assert ErrorSums(1.0, 2.0, 3.0) + ErrorSums(10.0, 20.0, 0.5) == ErrorSums(11.0, 22.0, 3.0)
    assert math.isnan((ErrorSums() + ErrorSums(max_abs=math.nan)).max_abs)
    assert math.isnan((ErrorSums(max_abs=math.nan) + ErrorSums(max_abs=1.0)).max_abs)
