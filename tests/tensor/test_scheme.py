"""Schemes and their spellings."""

from __future__ import annotations

import itertools

import pytest

from halfbin.errors import SchemeError
from halfbin.numerics import FORMATS, IntegerFormat, ScaleFormat
from halfbin.tensor import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme, parse_scheme
from halfbin.tensor.scheme import BLOCK_SCALED, states_scale
from tensor.cases import SCHEMES

INT4, FP4, FP8 = FORMATS["int4"], FORMATS["fp4_e2m1"], FORMATS["fp8_e4m3"]


def test_every_scheme_is_read_back_from_its_spelling() -> None:
    granularities: list[Granularity] = [PerGroup(32), PerGroup(128), PerBlock(128, 128), PerGroup(16, axis=1)]
    more = [
        Scheme(format=fmt, granularity=granularity, scale_format=stored)
        for fmt, granularity, stored in itertools.product(FORMATS.values(), granularities, ScaleFormat)
    ]
    for scheme in [*SCHEMES.values(), *more]:
        assert parse_scheme(str(scheme)) == scheme


def test_different_schemes_have_different_spellings() -> None:
    per_format = 9 * (4 + 3)  # granularities, times scales without and with a zero point
    integers = sum(isinstance(fmt, IntegerFormat) for fmt in FORMATS.values())
    assert len(SCHEMES) == integers * per_format + (len(FORMATS) - integers) * 9 * 4


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", Scheme(format=FORMATS["int8"], granularity=PerChannel())),
        ("int4-g128", Scheme(format=INT4, granularity=PerGroup(128))),
        ("int4-sym-g128-f32", Scheme(format=INT4, granularity=PerGroup(128))),
        ("int4-bf16-g128", Scheme(format=INT4, granularity=PerGroup(128), scale_format=ScaleFormat.BFLOAT16)),
        ("int4-g128@0", Scheme(format=INT4, granularity=PerGroup(128, axis=0))),
        ("fp8_e4m3-tensor", Scheme(format=FP8, granularity=PerTensor())),
        ("fp8_e4m3-b128x64", Scheme(format=FP8, granularity=PerBlock(128, 64))),
        ("int8-token", Scheme(format=FORMATS["int8"], granularity=PerToken())),
        ("int8-channel@1", Scheme(format=FORMATS["int8"], granularity=PerChannel(1))),
        ("mxfp4", Scheme(format=FP4, granularity=PerGroup(32), scale_format=ScaleFormat.E8M0)),
        ("fp4_e2m1-g32-e8m0", BLOCK_SCALED["mxfp4"]),
        ("mxfp8", Scheme(format=FP8, granularity=PerGroup(32), scale_format=ScaleFormat.E8M0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spellings_and_what_they_mean(text: str, scheme: Scheme) -> None:
    assert parse_scheme(text) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imt4-g128", r"'imt4' in scheme 'imt4-g128' is no format; did you mean 'int4'\?"),
        ("", r"'' in scheme '' is no format; expected one of int2, int3"),
        ("mxfp5", r"'mxfp5' in scheme 'mxfp5' is no format; did you mean 'mxfp[48]'\?"),
        ("int4-g128-assym", r"'assym' in scheme 'int4-g128-assym' is not understood; did you mean 'asym'\?"),
        ("int4-chanel", r"'chanel' in scheme 'int4-chanel' is not understood; did you mean 'channel'\?"),
        ("int4-b128", r"'b128' in scheme 'int4-b128' is not understood; did you mean"),
        ("int4-f15", r"'f15' in scheme 'int4-f15' is not understood; did you mean"),
        ("int4-g128-g64", r"'g64' in scheme 'int4-g128-g64' says a second time which weights share"),
        ("int4-f16-bf16", r"'bf16' in scheme 'int4-f16-bf16' says a second time how its scales are stored; keep one"),
        ("int4-sym-asym", r"'asym' in scheme 'int4-sym-asym' says a second time whether it has a zero point"),
        ("int4-g", r"'g' in scheme 'int4-g' is not understood"),
        ("int4-g-1", r"'g' in scheme 'int4-g-1' is not understood"),
        ("int4-", r"'' in scheme 'int4-' is not understood"),
        ("int4-g12345678901", r"'g12345678901' in scheme"),
        ("mxfp4-asym", r"'mxfp4' in scheme 'mxfp4-asym' is no format"),
        ("int4-g0", r"group_size=0 must be at least 1"),
        ("int4-b0x4", r"a block of 0 x 4 holds nothing"),
        ("nf4-g64-asym", r"nf4 has no zero point: asymmetric works with integer formats only"),
        ("int4-asym-e8m0", r"use f32, f16 or bf16 scales"),
    ],
    ids=lambda value: value if " " not in value and "\\" not in value else "",
)
def test_an_error_names_the_part_and_the_nearest_one(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("text", "states"),
    [("int4-g128", False), ("int4-asym", False), ("int4-f32", True), ("nf4-g64-bf16", True), ("mxfp4", True)],
    ids=str,
)
def test_whether_a_spelling_says_how_scales_are_stored(text: str, states: bool) -> None:
    assert states_scale(text) is states


def test_stored_bits_are_codes_scales_and_zero_points() -> None:
    scheme = parse_scheme("int4-g128-asym-f16")
    assert scheme.num_scales((8, 300)) == 24
    assert scheme.num_bits((8, 300)) == 2400 * 4 + 24 * (16 + 4)
    assert scheme.bits_per_weight((8, 300)) == 4.2
    assert parse_scheme("mxfp4").bits_per_weight((4, 64)) == 4.25
    assert scheme.bits_per_weight((0, 300)) == 0


def test_group_size_is_none_where_there_are_no_groups() -> None:
    assert parse_scheme("int4-g64").group_size == 64
    assert parse_scheme("int4-channel").group_size is None


def test_another_way_to_store_scales_leaves_the_rest() -> None:
    assert parse_scheme("int4-g64-asym").with_scale(ScaleFormat.BFLOAT16) == parse_scheme("int4-g64-asym-bf16")
    with pytest.raises(SchemeError, match="takes no zero point"):
        parse_scheme("int4-g64-asym").with_scale(ScaleFormat.E8M0)
