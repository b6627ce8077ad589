"""CRC-32: zlib's values, from every instruction set, at every length and alignment, in one piece and in several."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from halfbin.kernels.checksums import BEST_FIRST, PORTABLE, best, crc32, usable

EVERY_SET = pytest.mark.parametrize("instruction_set", usable())
LENGTHS = [*range(300), 511, 512, 513, 4095, 65537]


def some_bytes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@EVERY_SET
@pytest.mark.parametrize("start", range(17))
def test_every_length_and_alignment_gives_the_value_of_zlib(start: int, instruction_set: str) -> None:
    data = some_bytes(start + max(LENGTHS))
    for length in LENGTHS:
        part = data[start : start + length]
        for before in (0, 0xDEADBEEF):
            expected = zlib.crc32(part.numpy().tobytes(), before)
            assert crc32(part, before, instruction_set=instruction_set) == expected, (length, before)


@EVERY_SET
def test_pieces_one_after_the_other_give_the_value_of_the_whole(instruction_set: str) -> None:
    data = some_bytes(5000)
    for cut in range(0, 5001, 97):
        first = crc32(data[:cut], instruction_set=instruction_set)
        assert crc32(data[cut:], first, instruction_set=instruction_set) == zlib.crc32(data.numpy().tobytes())


@EVERY_SET
def test_every_single_bit_matters(instruction_set: str) -> None:
    data = torch.zeros(200, dtype=torch.uint8)
    seen = {crc32(data, instruction_set=instruction_set)}
    for place in range(len(data)):
        for bit in range(8):
            flipped = data.clone()
            flipped[place] = 1 << bit
            seen.add(crc32(flipped, instruction_set=instruction_set))
    assert len(seen) == 1 + 8 * len(data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_elements_count_in_their_order_whatever_their_type_and_strides(dtype: torch.dtype) -> None:
    x = (torch.arange(12).reshape(3, 4) % 5).to(dtype).T
    expected = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert crc32(x) == expected


def test_the_best_form_is_the_first_that_runs() -> None:
    assert best() == next(name for name in BEST_FIRST if name in usable())
    assert PORTABLE in usable()
    with pytest.raises(ValueError, match="no such instruction set"):
        crc32(torch.ones(1), instruction_set="none")
