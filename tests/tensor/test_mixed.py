"""Weights in two precisions: codes, and some columns in floating point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.tensor import (
    ColumnSpec,
    FloatColumns,
    MixedTensor,
    QTensor,
    dequantize,
    parse_scheme,
    quantize,
    split,
    take_columns,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def mixed(weight: Tensor, columns: Tensor, scheme: str = "int8-channel") -> MixedTensor:
    rest, kept = take_columns(weight, columns, weight.dtype)
    return MixedTensor(quantize(rest, parse_scheme(scheme)), kept)


SCHEMES = ["int8-channel", "int4-g8-asym", "nf4-g8", "fp8_e4m3-tensor"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_columns_come_back_as_they_were_and_the_rest_as_without_them(scheme: str) -> None:
    weight = normal(12, 32).to(torch.bfloat16)
    weight[:, 9] *= 100
    whole = mixed(weight, ids(3, 9, 31), scheme)
    zeroed = weight.clone()
    zeroed[:, [3, 9, 31]] = 0
    expected = dequantize(quantize(zeroed, parse_scheme(scheme)))
    expected[:, [3, 9, 31]] = weight[:, [3, 9, 31]].float()
    assert torch.equal(dequantize(whole), expected)
    assert torch.equal(dequantize(whole, torch.bfloat16)[:, [3, 9, 31]], weight[:, [3, 9, 31]])
    assert not torch.equal(dequantize(whole.q)[:, 9], weight[:, 9].float())


def test_columns_that_are_taken_out_set_no_scale() -> None:
    weight = normal(12, 32)
    large = weight.clone()
    large[:, [3, 9]] *= 100
    assert torch.equal(mixed(large, ids(3, 9)).q.codes, mixed(weight, ids(3, 9)).q.codes)
    assert torch.equal(mixed(large, ids(3, 9)).q.scale, mixed(weight, ids(3, 9)).q.scale)
    assert torch.equal(large[:, 9], 100 * weight[:, 9])  # the caller's weight is not ours


def test_what_the_codes_say_of_a_column_is_not_looked_at() -> None:
    weight = normal(12, 32)
    whole, codes = mixed(weight, ids(3)), quantize(weight, parse_scheme("int8-channel"))
    assert torch.equal(dequantize(MixedTensor(codes, whole.columns))[:, 3], dequantize(whole)[:, 3])
    assert dequantize(codes)[:, 3].any()


def test_a_weight_stored_transposed_has_its_columns_as_rows() -> None:
    weight = normal(12, 32)
    whole = mixed(weight, ids(3, 9))
    q = quantize(whole.q.codes.T.float(), parse_scheme("int8-channel@1"), scale=whole.q.scale.T.contiguous())
    q = QTensor(whole.q.codes.T.contiguous(), q.scale, None, q.scheme)
    stored = MixedTensor(q, whole.columns.as_stored(transposed=True))
    assert torch.equal(dequantize(stored), dequantize(whole).T)
    assert torch.equal(stored.rounded, whole.rounded.T)
    assert whole.columns.as_stored(transposed=False) is whole.columns
    assert stored.num_bits == whole.num_bits


def test_everything_that_is_stored_is_counted() -> None:
    whole = mixed(normal(12, 32).to(torch.float16), ids(3, 9, 31))
    # A byte a code, four a scale, four the number of a column, two each of its 12 values.
    assert whole.num_bits == 8 * (12 * 32 + 12 * 4 + 3 * 4 + 3 * 12 * 2)
    assert whole.bits_per_weight == whole.num_bits / (12 * 32)
    held = [whole.q.codes, whole.q.scale, whole.columns.ids, whole.columns.values]
    assert whole.num_bits == 8 * sum(t.numel() * t.itemsize for t in held)
    assert whole.columns.spec == ColumnSpec(count=3, dtype=torch.float16, axis=1)
    assert whole.columns.spec.num_bytes(whole.shape) == 3 * 4 + 3 * 12 * 2


def test_the_mask_counts_every_element_outside_the_columns() -> None:
    whole = mixed(normal(12, 32), ids(0, 31))
    assert whole.rounded.shape == whole.shape
    assert int(whole.rounded.sum()) == 12 * 30
    assert not whole.rounded[:, [0, 31]].any()


@pytest.mark.parametrize(
    ("stored", "factor", "dtype"),
    [
        pytest.param(torch.bfloat16, 1.0, torch.bfloat16, id="its own type"),
        pytest.param(torch.float16, 1.0, torch.float16, id="its own, the other"),
        pytest.param(torch.float32, 1.0, torch.float16, id="the more precise"),
        pytest.param(torch.float32, 1e6, torch.bfloat16, id="the one with the range"),
        pytest.param(torch.float16, 1e6, torch.bfloat16, id="grown out of its own"),
    ],
)
def test_columns_have_16_bits_that_hold_them(stored: torch.dtype, factor: float, dtype: torch.dtype) -> None:
    _, kept = take_columns(factor * normal(12, 32), ids(3), stored)
    assert kept.values.dtype == dtype
    assert torch.equal(kept.values, (factor * normal(12, 32))[:, [3]].to(dtype))


def test_split_gives_codes_and_columns() -> None:
    whole = mixed(normal(12, 32), ids(3))
    assert split(whole) == (whole.q, whole.columns)
    assert split(whole.q) == (whole.q, None)


VALUES = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("numbers", "values", "words"),
    [
        pytest.param(ids(), VALUES[:, :0], "expected 1 or more", id="none"),
        pytest.param(ids(2, 1), VALUES, "rising", id="falling"),
        pytest.param(ids(1, 1), VALUES, "none comes twice", id="twice"),
        pytest.param(ids(-1, 1), VALUES, "0 or more", id="negative"),
        pytest.param(ids(0, 2**31 - 1, -2, 3), torch.ones(4, 4), "rising", id="differences that overflow"),
        pytest.param(ids(1, 2).long(), VALUES, "are int32", id="wide numbers"),
        pytest.param(ids(1, 2, 3), VALUES, "do not fit values", id="count"),
        pytest.param(ids(1, 2), VALUES.double(), "16- or 32-bit floats", id="float64"),
        pytest.param(ids(1, 2), VALUES.int(), "16- or 32-bit floats", id="integers"),
        pytest.param(ids(1, 2)[None], VALUES, "do not fit", id="numbers in a matrix"),
    ],
)
def test_columns_that_mean_nothing_are_refused(numbers: Tensor, values: Tensor, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        FloatColumns(numbers, values)


def test_columns_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        FloatColumns(ids(1, 2), torch.full((4, 2), math.inf))


def test_columns_of_another_weight_are_refused() -> None:
    q = quantize(normal(4, 8), parse_scheme("int8-channel"))
    for columns, words in (
        (FloatColumns(ids(1, 8), VALUES), "there is no column 8"),
        (FloatColumns(ids(1, 2), torch.ones(5, 2)), r"columns \[5, 2\] are none of a weight \[4, 8\]"),
        (FloatColumns(ids(1, 2), VALUES.T.contiguous(), 0), r"expected \[2, 8\]"),
    ):
        with pytest.raises(SchemeError, match=words):
            MixedTensor(q, columns)
    with pytest.raises(SchemeError, match="has no 2 columns"):
        MixedTensor(quantize(normal(2, 4, 8), parse_scheme("int8-token")), FloatColumns(ids(1, 2), VALUES))
    for numbers in (ids(8), ids(-1)):
        with pytest.raises(SchemeError, match="are not all in 0 to 7"):
            take_columns(normal(4, 8), numbers, torch.float32)
