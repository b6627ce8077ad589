"""Every item is worked on once, by the promised number of threads, and an error in one comes out."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from halfbin.kernels.threads import in_threads


@pytest.mark.parametrize("num_items", [1, 2, 3, 10])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_item_is_worked_on_once_with_one_torch_thread_each(num_items: int, threads: int) -> None:
    done: list[int] = []
    counts: list[int] = []
    before = torch.get_num_threads()

    def work(share: Sequence[int]) -> None:
        if threading.current_thread() is not threading.main_thread():
            counts.append(torch.get_num_threads())
        done.extend(share)

    torch.set_num_threads(threads)
    try:
        in_threads(range(num_items), work)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(num_items))
    assert counts == [1] * (0 if threads == 1 or num_items == 1 else min(threads, num_items))


def test_an_error_in_a_share_is_raised_and_the_count_is_put_back() -> None:
    before = torch.get_num_threads()

    def work(share: Sequence[int]) -> None:
        raise ZeroDivisionError

    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            in_threads([1, 2, 3], work)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
