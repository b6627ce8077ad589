from __future__ import annotations

import pytest
import torch

from halfbin.errors import SchemeError
from halfbin.packing import pack, pack_words, packed_size, unpack, unpack_words

WIDTHS = [pytest.param(bits, id=f"{bits}-bit") for bits in range(1, 9)]
GENERATOR = torch.Generator().manual_seed(0)


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=GENERATOR, dtype=torch.uint8)


def packed_one_bit_at_a_time(codes: list[int], bits: int) -> bytes:
    """The definition, spelled out: code i lies in bits [i * bits, i * bits + bits) of one long number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(packed_size(len(codes), bits), "little")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("num_codes", [pytest.param(n, id=f"{n}-codes") for n in range(34)])
def test_codes_come_back_for_every_width_and_every_tail(bits: int, num_codes: int) -> None:
    codes = random_codes(bits, 3, num_codes)
    assert torch.equal(unpack(pack(codes, bits), bits, num_codes), codes)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, num_codes), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_value_comes_back_at_every_place_of_a_block(bits: int) -> None:
    for place in range(8):
        codes = torch.zeros(2**bits, 8, dtype=torch.uint8)
        codes[:, place] = torch.arange(2**bits).to(torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 8), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stream_is_dense_and_least_significant_first(bits: int) -> None:
    for num_codes in (1, 7, 8, 9, 31, 32, 33):
        row = random_codes(bits, num_codes)
        assert bytes(pack(row, bits).tolist()) == packed_one_bit_at_a_time(row.tolist(), bits)


def test_three_bit_codes_lie_as_the_drawing_shows() -> None:
    codes = torch.tensor([0b001, 0b010, 0b101, 0b110, 0b011, 0b100, 0b111, 0b000], dtype=torch.uint8)
    expected = [0b01_010_001, 0b0_011_110_1, 0b000_111_10]
    assert pack(codes, 3).tolist() == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    stream = torch.arange(256).to(torch.uint8).repeat(bits).reshape(-1, bits)  # whole blocks of eight codes
    assert torch.equal(pack(unpack(stream, bits, 8), bits), stream)


@pytest.mark.parametrize("bits", WIDTHS)
def test_many_rows_in_chunks_pack_like_each_row_alone(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(bits, 13, 37)
    alone = torch.stack([pack(row, bits) for row in codes])
    monkeypatch.setattr("halfbin.packing.bits.CHUNK_CODES", 100)
    assert torch.equal(pack(codes, bits), alone)
    assert torch.equal(unpack(alone, bits, 37), codes)


def test_leading_axes_stay_as_they_are() -> None:
    codes = random_codes(4, 2, 3, 5)
    assert pack(codes, 4).shape == (2, 3, 3)
    assert torch.equal(unpack(pack(codes, 4), 4, 5), codes)


def test_a_code_that_needs_more_bits_is_refused_with_its_place() -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    codes[1, 2] = 8
    with pytest.raises(SchemeError, match=r"code 8 at \[1, 2\] does not fit into 3 bits"):
        pack(codes, 3)


@pytest.mark.parametrize("bits", [0, 9], ids=["none", "nine"])
def test_widths_without_a_packing_are_refused(bits: int) -> None:
    with pytest.raises(SchemeError, match="expected 1 to 8"):
        pack(torch.zeros(1, dtype=torch.uint8), bits)


def test_a_stream_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(SchemeError, match="5 codes of 3 bits take 2 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
    with pytest.raises(SchemeError, match="take 1 int32 words"):
        unpack_words(torch.zeros(2, dtype=torch.int32), 3, 5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_equal_those_of_the_compressed_tensors_library(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 5, 75)
    signed = (codes.to(torch.int32) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), helpers.pack_to_int32(signed, bits))
