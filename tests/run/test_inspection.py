"""What is said of a tensor on disk: how its codes are used, and what it takes."""

from __future__ import annotations

import json

import pytest
import torch

from halfbin.run.inspection import Inspection, code_use, inspect_tensor
from halfbin.tensor.mixed import MixedTensor, take_columns
from halfbin.tensor.qtensor import QTensor, quantize
from halfbin.tensor.scheme import parse_scheme


def test_codes_are_counted_by_rising_value() -> None:
    weight = torch.tensor([[-7.0, -7.0, 3.0, 7.0, 0.0]])  # the scale is 1, as int4 reaches 7
    use = code_use(quantize(weight, parse_scheme("int4-channel")))
    assert use.levels == tuple(range(-8, 8))
    taken = {level: count for level, count in zip(use.levels, use.counts, strict=True) if count}
    assert taken == {-7: 2, 0: 1, 3: 1, 7: 1}
    assert use.saturated == 1 and use.unused == 12


@pytest.mark.parametrize(
    "spelling", ["int8-channel", "nf4-g64", "fp8_e4m3-channel", "mxfp4", "ternary-channel", "int4-g32-asym"]
)
def test_every_element_is_counted_once(spelling: str) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    use = code_use(quantize(weight, parse_scheme(spelling)))
    assert sum(use.counts) == weight.numel() and use.not_finite == 0
    assert list(use.levels) == sorted(set(use.levels))


def test_both_zeros_of_a_float_format_are_one_level_and_nan_is_told_apart() -> None:
    scheme = parse_scheme("fp8_e4m3-tensor")
    codes = torch.tensor([[0x00, 0x80, 0x7F, 0x38]], dtype=torch.uint8)  # 0, -0, NaN, 1
    use = code_use(QTensor(codes, torch.ones(1, 1), None, scheme))
    counts = dict(zip(use.levels, use.counts, strict=True))
    assert counts[0.0] == 2 and counts[1.0] == 1 and use.not_finite == 1


def test_bits_per_weight_are_over_quantized_tensors_and_over_everything() -> None:
    codes = quantize(torch.ones(2, 32), parse_scheme("int4-g32"))
    tensors = (
        inspect_tensor("w", 40, lambda: codes),
        inspect_tensor("norm", 64, lambda: torch.ones(32, dtype=torch.bfloat16)),
    )
    inspection = Inspection(path="p", layout="halfbin", bytes=104, tensors=tensors)
    assert inspection.bits_per_weight == 8 * 40 / 64
    assert inspection.bits_per_weight_total == 8 * 104 / 96
    document = json.loads(json.dumps(inspection.to_json(), allow_nan=False))
    assert document["tensors"][0]["codes"]["unused"] == 15  # only the code of 1.0 is taken
    assert document["tensors"][1]["dtype"] == "bfloat16" and document["tensors"][1]["codes"] is None


def test_columns_in_floating_point_are_told_and_are_no_codes() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    rest, columns = take_columns(weight, torch.tensor([1, 5, 9]), torch.bfloat16)
    found = inspect_tensor("w", 200, lambda: MixedTensor(quantize(rest, parse_scheme("int8-channel")), columns))
    assert found.weights == "int8-channel + 3 bfloat16"
    assert found.codes is not None and sum(found.codes.counts) == 4 * 29
    document = found.to_json()
    assert (document["scheme"], document["float_columns"], document["column_dtype"]) == ("int8-channel", 3, "bfloat16")
    assert inspect_tensor("w", 1, lambda: quantize(rest, parse_scheme("int8-channel"))).weights == "int8-channel"
