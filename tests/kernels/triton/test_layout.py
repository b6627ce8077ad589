"""Weights laid out for GPUs by torch alone: no Triton needed."""

from __future__ import annotations

import pytest
import torch

from halfbin.kernels.triton.layout import pack_float8, pack_integers
from halfbin.kernels.triton.quantized_inputs import Range
from halfbin.kernels.triton.tiles import DECODE, PROGRAMS, cut


def test_pairs_of_columns_that_are_16_apart_share_a_byte() -> None:
    codes = torch.arange(70).remainder(13).to(torch.uint8).expand(2, 70)
    packed = pack_integers(codes, torch.ones(2, 1), None, bits=4, least=0, group_size=70)
    assert packed.codes.shape == (2, 48)
    for column in range(70):
        byte = int(packed.codes[1, column // 32 * 16 + column % 16])
        assert (byte >> 4 if column % 32 >= 16 else byte & 15) == column % 13
    assert packed.codes[0, 32 + 6 :].count_nonzero() == 0  # 70 = 2 * 32 + 6


def test_codes_and_zero_points_are_stored_from_0_on() -> None:
    codes, zero = torch.tensor([[-128, 127]], dtype=torch.int8), torch.tensor([[-128]], dtype=torch.int32)
    packed = pack_integers(codes, torch.ones(1, 1), zero, bits=8, least=-128, group_size=2)
    assert packed.codes.tolist() == [[0, 255]]
    assert packed.offset is not None and packed.offset.tolist() == [[0]]
    assert pack_integers(codes, torch.ones(1, 1), None, bits=8, least=-128, group_size=2).constant == 128


def test_scales_are_transposed_and_keep_their_type() -> None:
    scale = torch.arange(6, dtype=torch.float16).view(2, 3)
    packed = pack_float8(torch.zeros(2, 96, dtype=torch.uint8), scale, group_size=32)
    assert packed.scale.dtype == torch.float16 and packed.scale.is_contiguous()
    assert torch.equal(packed.scale, scale.T)


def test_what_cannot_be_laid_out_is_refused_in_words() -> None:
    codes = torch.zeros(4, 80, dtype=torch.int8)
    with pytest.raises(ValueError, match="groups of 40 columns are no multiple of 32"):
        pack_integers(codes, torch.ones(4, 2), None, bits=4, least=-8, group_size=40)
    with pytest.raises(ValueError, match=r"scale is \[4, 2\], expected \[4, 3\]"):
        pack_integers(codes, torch.ones(4, 2), None, bits=4, least=-8, group_size=32)
    with pytest.raises(ValueError, match=r"scales are torch.float64"):
        pack_float8(codes.view(torch.uint8), torch.ones(4, 1).double(), group_size=80)
    with pytest.raises(ValueError, match="codes 0 to 255 must hold 0 and fit int8"):
        Range(0, 255)


def test_splits_cover_all_columns_once_and_no_step_crosses_a_group() -> None:
    for tokens in (1, DECODE, DECODE + 1, 64, 65, 1000):
        for rows in (1, 64, 4096, 100_000):
            for columns, size in ((1, 1), (32, 32), (300, 300), (4096, 128), (11008, 96), (11008, 11008), (70, 64)):
                way = cut(tokens, rows, columns, size)
                assert (way.splits - 1) * way.span < columns <= way.splits * way.span
                assert way.span % way.tile.columns == 0
                assert size >= columns or size % way.tile.columns == 0
                assert way.splits == 1 or tokens <= DECODE
                assert way.splits * -(-rows // way.tile.rows) <= max(PROGRAMS, -(-rows // way.tile.rows))
