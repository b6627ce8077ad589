"""The pass over memory that other kernels are held against."""

from __future__ import annotations

import pytest
import torch

from halfbin.kernels import _native
from halfbin.kernels.streaming import read_rate


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_words", [0, 1, 15, 16, 17, 1000, 100_003])
def test_every_word_is_read_once(num_words: int, num_threads: int) -> None:
    words = torch.arange(num_words, dtype=torch.int64)
    assert _native.read_once(words.view(torch.uint64), num_threads) == int(words.sum())


def test_a_rate_is_measured() -> None:
    assert read_rate(1, num_words=2**16, rounds=3) > 1e8  # bytes a second: any machine reads faster


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        _native.read_once(torch.zeros(4), 1)
