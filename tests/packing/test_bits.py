"""Packing loses nothing, and its bytes are the ones that the formats ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.kernels.instruction_sets import usable
from halfbin.packing import bits as bits_module
from halfbin.packing import folding, pack, pack_words, packed_size, plain, unpack, unpack_words

WIDTHS = pytest.mark.parametrize("bits", range(1, 9), ids=lambda bits: f"{bits}-bit")
TAILS = range(34)  # all remainders of 8 codes and of 32, and one more


def every_code_everywhere(bits: int, num_codes: int) -> Tensor:
    """uint8 [2**bits, num_codes]: over the rows, each position holds every code."""
    return (torch.arange(1 << bits)[:, None] + 5 * torch.arange(num_codes)).remainder(1 << bits).to(torch.uint8)


def stream_by_integers(codes: Tensor, bits: int, size: int) -> Tensor:
    """The definition in Python's unbounded integers: code i is worth code << (i * bits)."""
    rows = [sum(code << i * bits for i, code in enumerate(row)).to_bytes(size, "little") for row in codes.tolist()]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8).reshape(len(rows), size)


def stream_by_numpy(codes: Tensor, bits: int) -> Tensor:
    """The definition, bit by bit."""
    each = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    return torch.from_numpy(np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little"))


@pytest.fixture(params=["folding", "plain", *usable()], autouse=True)
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with every way to move bits."""
    by_torch = {"folding": folding, "plain": plain}
    monkeypatch.setattr(bits_module, "_mover", by_torch.get(request.param, folding))
    monkeypatch.setattr(bits_module, "_instruction_set", None if request.param in by_torch else request.param)


@WIDTHS
def test_every_code_at_every_position_of_every_tail_lies_where_the_definition_says(bits: int) -> None:
    for num_codes in TAILS:
        codes = every_code_everywhere(bits, num_codes)
        packed = pack(codes, bits)
        assert torch.equal(packed, stream_by_integers(codes, bits, packed_size(num_codes, bits))), num_codes
        assert torch.equal(unpack(packed, bits, num_codes), codes), num_codes


@WIDTHS
def test_words_are_the_same_stream_filled_up_with_zeros(bits: int) -> None:
    for num_codes in TAILS:
        codes = every_code_everywhere(bits, num_codes)
        words = pack_words(codes, bits)
        num_words = (num_codes * bits + 31) // 32
        assert words.dtype == torch.int32
        assert words.shape == (1 << bits, num_words)
        assert torch.equal(words.view(torch.uint8), stream_by_integers(codes, bits, 4 * num_words)), num_codes
        assert torch.equal(unpack_words(words, bits, num_codes), codes), num_codes


@pytest.mark.parametrize("num_codes", [1, 31, 32, 33, 64, 100, 257], ids=lambda n: f"{n} codes")
@WIDTHS
def test_words_equal_those_of_compressed_tensors(bits: int, num_codes: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (7, num_codes), dtype=torch.uint8, generator=generator)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)  # the peer adds half of the range by itself
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_words(codes, bits), theirs)
    assert torch.equal(unpack_words(theirs, bits, num_codes), codes)


@WIDTHS
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, bits)  # 8 codes a row, so nothing is filled up
    assert torch.equal(pack(unpack(packed, bits, 8), bits), packed)


def test_three_bit_codes_lie_as_the_drawing_shows() -> None:
    codes = torch.tensor([0b001, 0b010, 0b011, 0b100, 0b101, 0b110, 0b111, 0b001, 0b101], dtype=torch.uint8)
    #     c2c2 c1 c0   c5 c4 c3 c2   c7 c6 c5c5   c8, then zeros
    drawn = [0b11_010_001, 0b0_101_100_0, 0b001_111_11, 0b00000_101]
    assert pack(codes, 3).tolist() == drawn
    assert pack_words(codes, 3).tolist() == [int.from_bytes(bytes(drawn), "little")]


def test_four_bit_codes_put_the_first_into_the_low_nibble() -> None:
    assert pack(torch.tensor([0x1, 0x2, 0x3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]


@given(st.data())
def test_unpacking_undoes_packing(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    shape = [*data.draw(st.lists(st.integers(0, 5), max_size=2)), data.draw(st.integers(0, 70))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, shape[-1]), codes)


@pytest.mark.parametrize("num_codes", [127, 128, 129, 191, 200, 513, 65535, 65536, 65545], ids=lambda n: f"{n} codes")
@WIDTHS
def test_long_rows_lie_where_the_definition_says(bits: int, num_codes: int) -> None:
    rows = 3 if num_codes < 1000 else 1
    codes = torch.randint(0, 1 << bits, (rows, num_codes), generator=torch.Generator().manual_seed(bits)).to(
        torch.uint8
    )
    packed = pack(codes, bits)
    assert torch.equal(packed, stream_by_numpy(codes, bits))
    assert torch.equal(unpack(packed, bits, num_codes), codes)


@WIDTHS
def test_tiles_do_not_show_in_the_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 1 << bits, (5, 83), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = pack(codes, bits)
    for tile_codes in (16, 200):  # less than a row; two rows and a rest
        monkeypatch.setattr(bits_module, "TILE_CODES", tile_codes)
        assert torch.equal(pack(codes, bits), whole)
        assert torch.equal(unpack(whole, bits, 83), codes)


@WIDTHS
def test_strided_views_pack_like_their_copies(bits: int) -> None:
    codes = every_code_everywhere(bits, 24)
    views = (codes.T, codes[:, ::2], codes[:, 3:20], codes.reshape(-1, 2, 12).transpose(0, 1))
    odd = (codes.flatten()[1:41], codes[1:2, 8:16], codes[:1, :16])  # offsets and strides that no 64-bit word has
    for view in (*views, *odd):
        packed = pack(view, bits)
        assert torch.equal(packed, pack(view.contiguous(), bits))
        assert torch.equal(unpack(packed[..., :], bits, view.shape[-1]), view)
    wide = torch.stack([pack(codes, bits)] * 2, dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(unpack(wide, bits, 24), codes)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), pack(codes, bits).flatten()])[1:]
    assert torch.equal(unpack(shifted.view(-1, 3 * bits), bits, 24), codes)


@WIDTHS
def test_packing_leaves_the_callers_codes_alone(bits: int) -> None:
    codes = every_code_everywhere(bits, 16)
    before = codes.clone()
    packed = pack(codes, bits)
    packed.fill_(0)
    unpack(packed, bits, 16).fill_(1)
    assert torch.equal(codes, before)
    assert not packed.any()


@pytest.mark.parametrize("bits", range(1, 8), ids=lambda bits: f"{bits}-bit")
def test_a_code_that_is_too_wide_is_refused_with_its_position(bits: int) -> None:
    codes = torch.zeros(2, 3, 10, dtype=torch.uint8)
    codes[1, 2, 4] = 1 << bits  # one too many, and the only one: a limit that is off by one would let it pass
    with pytest.raises(SchemeError, match=rf"code {1 << bits} at \[1, 2, 4\] does not fit into {bits} bits"):
        pack(codes, bits)
    with pytest.raises(SchemeError, match=r"at \[1, 2, 4\]"):
        pack_words(codes, bits)


@pytest.mark.parametrize("bits", [0, 9, -1], ids=lambda bits: f"{bits} bits")
def test_widths_beyond_a_byte_are_refused(bits: int) -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    for attempt in (lambda: pack(codes, bits), lambda: unpack(codes, bits, 4), lambda: packed_size(4, bits)):
        with pytest.raises(SchemeError, match=f"codes of {bits} bits cannot be packed; expected 1 to 8"):
            attempt()


def test_what_is_no_row_of_codes_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"must be uint8 or int8 \[\.\.\., n\].*int64 \[3\]"):
        pack(torch.tensor([1, 2, 3]), 4)
    with pytest.raises(SchemeError, match=r"must be uint8"):
        pack(torch.tensor(3, dtype=torch.uint8), 4)
    with pytest.raises(SchemeError, match="cannot hold -1 codes"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4, -1)


def test_a_stream_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"9 codes of 3 bits take 4 bytes a row, got torch.uint8 \[2, 3\]"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 3, 9)
    with pytest.raises(SchemeError, match=r"11 codes of 3 bits take 2 int32 words a row, got torch.int32 \[2, 1\]"):
        unpack_words(torch.zeros(2, 1, dtype=torch.int32), 3, 11)


def test_words_are_refused_on_a_big_endian_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(SchemeError, match="use pack and unpack"):
        pack_words(codes, 4)
    with pytest.raises(SchemeError, match="use pack and unpack"):
        unpack_words(torch.zeros(1, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("bits", range(1, 9), ids=lambda bits: f"{bits}-bit")
def test_signed_codes_are_counted_from_the_lowest(bits: int) -> None:
    lowest = -(1 << (bits - 1))
    codes = torch.arange(lowest, lowest + (1 << bits), dtype=torch.int8).repeat(3, 2)
    counted = (codes.to(torch.int16) - lowest).to(torch.uint8)
    assert torch.equal(pack(codes, bits, lowest=lowest), pack(counted, bits))
    assert torch.equal(pack_words(codes, bits, lowest=lowest), pack_words(counted, bits))


@pytest.mark.parametrize("bits", range(2, 8), ids=lambda bits: f"{bits}-bit")
@pytest.mark.parametrize("beyond", [-1, 0], ids=["below", "above"])
def test_a_signed_code_beyond_either_end_is_refused_with_its_position(bits: int, beyond: int) -> None:
    lowest = -(1 << (bits - 1))
    codes = torch.zeros(2, 5, dtype=torch.int8)
    codes[1, 3] = lowest - 1 if beyond else lowest + (1 << bits)
    with pytest.raises(SchemeError, match=rf"code {int(codes[1, 3])} at \[1, 3\] does not fit"):
        pack(codes, bits, lowest=lowest)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_tiles_change_no_byte(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (37, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, before = pack(codes, 3), torch.get_num_threads()
    monkeypatch.setattr("halfbin.packing.bits.TILE_CODES", 640)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(pack(codes, 3), whole)
        assert torch.equal(unpack(whole, 3, 299), codes)
    finally:
        torch.set_num_threads(before)
