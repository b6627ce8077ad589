"""The fast loops give the bits of the plain code: for every format, granularity, shape, thread count and piece size."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from halfbin.errors import DataError
from halfbin.kernels import rounding
from halfbin.tensor import parse_scheme, quantize
from halfbin.tensor.qtensor import QTensor, quantize_plainly
from halfbin.tensor.rowwise import Rowwise, rowwise

SCHEMES = [
    "int4-g128",
    "int4-g128-bf16",
    "int4-g32-asym-f16",
    "int8-channel",
    "int8-channel-asym",
    "uint8-channel-asym",
    "int2-g16",
    "fp8_e4m3-channel",
    "fp8_e4m3-g32-bf16",
    "nf4-g64",
    "ternary-channel",
    "int8-token",
    "fp8_e5m2-channel-f16",
    "mxfp4",
    "uint4-channel",
    "int8-tensor",
    "int4-tensor-asym",
]
SHAPES = [(1, 1), (3, 300), (7, 128), (64, 1), (2, 5, 96), (33, 4, 3, 3)]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Heavy tails, exact ties, zeros of both signs, a row of zeros and a subnormal."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) ** 3
    flat = x.flatten()
    flat[::5] = (flat[::5] * 2).round() / 2
    flat[::11] = -0.0
    flat[-1] = 1e-40
    x = flat.view(shape)
    x[len(x) // 2] = 0.0
    return x.to(dtype)


@pytest.fixture(params=["compiled", "in pieces"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled loops and with torch's."""
    monkeypatch.setattr(rounding, "compiled", lambda: request.param == "compiled")


def assert_same(a: QTensor, b: QTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert a.codes.dtype == b.codes.dtype
    assert torch.equal(a.scale.float(), b.scale.float())
    assert a.scale.dtype == b.scale.dtype
    assert (a.zero_point is None) == (b.zero_point is None)
    assert a.zero_point is None or b.zero_point is None or torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spelling", SCHEMES)
def test_the_fast_path_gives_the_bits_of_the_plain_one(
    spelling: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, scheme = weights(shape, dtype), parse_scheme(spelling)
    plain = quantize_plainly(x, scheme)
    half = scheme.scale_format.round(plain.scale.float() * 0.5)  # half of the smallest float16 would be 0
    for piece in (rounding.PIECE,) if rounding.compiled() else (1, 50, rounding.PIECE):
        monkeypatch.setattr(rounding, "PIECE", piece)
        assert isinstance(rowwise(x, scheme), Rowwise)
        assert_same(quantize(x, scheme), plain)
        assert_same(
            quantize(x, scheme, scale=half, zero_point=plain.zero_point),
            quantize_plainly(x, scheme, scale=half, zero_point=plain.zero_point),
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit_and_the_callers_count_stays(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scheme = weights((50, 700), torch.bfloat16), parse_scheme("int4-g128-asym")
    plain, before = quantize_plainly(x, scheme), torch.get_num_threads()
    monkeypatch.setattr(rounding, "PIECE", 1000)
    torch.set_num_threads(threads)
    try:
        assert_same(quantize(x, scheme), plain)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_every_bf16_number_is_rounded_alike() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    x = x[: len(x) // 64 * 64].view(-1, 64)
    for spelling in ("int8-channel", "fp8_e4m3-channel", "nf4-g16", "int4-g32-asym"):
        assert_same(quantize(x, parse_scheme(spelling)), quantize_plainly(x, parse_scheme(spelling)))


@pytest.mark.parametrize("spelling", ["nf4-channel", "ternary-channel", "fp8_e4m3-channel", "int3-channel"])
def test_the_three_numbers_around_every_tie_are_rounded_alike(spelling: str) -> None:
    scheme = parse_scheme(spelling)
    values = scheme.format.decode(scheme.format.codes, torch.float64)
    values = values[values.isfinite()].sort().values
    ties = ((values[1:] + values[:-1]) / 2).float()
    x = torch.cat([torch.nextafter(ties, ties - 1), ties, torch.nextafter(ties, ties + 1)])[None]
    one = torch.ones(1, 1)
    assert_same(quantize(x, scheme, scale=one), quantize_plainly(x, scheme, scale=one))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_wherever_it_stands(value: float) -> None:
    for place in (0, 300, 599):
        x = torch.ones(2, 300)
        x.view(-1)[place] = value
        rows = rowwise(x, parse_scheme("int4-g128"))
        assert isinstance(rows, Rowwise)
        assert rows.quantize() is None
        with pytest.raises(DataError, match=re.escape(f"the first is {value} at {[place // 300, place % 300]}")):
            quantize(x, parse_scheme("int4-g128"))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        pytest.param(torch.ones(2, 3, dtype=torch.float64), "float64", id="float64"),
        pytest.param(torch.ones(3, 2).T, "strides", id="transposed"),
        pytest.param(torch.ones(0, 2), "no elements", id="empty"),
        pytest.param(torch.ones(2, 2, device="meta"), "meta", id="another device"),
    ],
)
def test_what_the_loops_cannot_take_is_refused_in_words(x: Tensor, words: str) -> None:
    assert words in str(rounding.refuses(x))
