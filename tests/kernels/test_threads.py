"""Every item is worked on once, by the promised number of threads, and an error in one comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from halfbin.kernels.threads import in_order, in_threads, in_turns


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 10])
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
    assert counts == [1] * (0 if threads == 1 or num_items < 2 else min(threads, num_items))


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


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_item_is_taken_once_by_a_thread_with_one_torch_thread(num_items: int, threads: int) -> None:
    done: list[int] = []
    counts: list[int] = []
    before = torch.get_num_threads()

    def work(item: int) -> None:
        counts.append(torch.get_num_threads())
        done.append(item)

    torch.set_num_threads(threads)
    try:
        in_turns(range(num_items), work)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(num_items))
    assert set(counts) <= {threads if num_items == 1 else 1}


def test_a_thread_that_is_held_up_leaves_the_rest_to_the_others() -> None:
    done: list[int] = []
    all_others = threading.Event()
    before = torch.get_num_threads()

    def work(item: int) -> None:
        if item == 0:
            assert all_others.wait(10)
        done.append(item)
        if len(done) == 9:
            all_others.set()

    torch.set_num_threads(2)
    try:
        in_turns(range(10), work)
    finally:
        torch.set_num_threads(before)
    assert done == [*range(1, 10), 0]


def test_an_error_on_a_turn_is_raised() -> None:
    before = torch.get_num_threads()

    def work(item: int) -> None:
        if item == 3:
            raise IndexError(item)

    torch.set_num_threads(2)
    try:
        with pytest.raises(IndexError):
            in_turns(range(6), work)
    finally:
        torch.set_num_threads(before)


def numbers_given(num_items: int, *, in_flight: int, threads: int = 2) -> tuple[list[int], int]:
    """What `in_order` gives for items of one byte each, and how many were begun and not given at the most."""
    begun, most = 0, 0
    given: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - len(given))
        return item * item

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for item, result in in_order(range(num_items), work, num_bytes=lambda item: 1, in_flight=in_flight):
            assert result == item * item
            given.append(item)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return given, most


@pytest.mark.parametrize("num_items", [0, 1, 2, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(num_items: int, threads: int) -> None:
    assert numbers_given(num_items, in_flight=100, threads=threads)[0] == list(range(num_items))


@pytest.mark.parametrize("in_flight", [0, 1, 3])
def test_no_more_is_in_flight_than_was_allowed_but_always_one(in_flight: int) -> None:
    given, most = numbers_given(40, in_flight=in_flight)
    assert given == list(range(40))
    assert most <= max(in_flight, 1) + 1  # the one that was just given is not counted as given yet


def test_a_result_that_is_there_is_given_before_the_next_item_is_begun() -> None:
    """So that what was made is written and gone, and does not pile up until so much is in flight as may be."""
    done, given, seen = threading.Event(), list[int](), list[list[int]]()

    def items() -> Iterator[int]:
        yield 0
        assert done.wait(10)
        time.sleep(0.05)  # from the end of the work to the end of its future
        yield 1
        seen.append(list(given))
        yield 2

    def work(item: int) -> None:
        done.set()

    for item, _ in in_order(items(), work, num_bytes=lambda item: 1, in_flight=1000):
        given.append(item)
    assert seen == [[0]] and given == [0, 1, 2]


def test_an_error_comes_out_where_its_result_would_and_nothing_further_is_begun() -> None:
    begun: list[int] = []
    given: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 1 // (5 - item)

    with pytest.raises(ZeroDivisionError):
        given.extend(item for item, _ in in_order(range(1000), work, num_bytes=lambda item: 1, in_flight=3))
    assert len(begun) < 12


def test_a_caller_who_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    results = in_order(range(1000), lambda item: item, num_bytes=lambda item: 1, in_flight=3)
    assert next(results) == (0, 0)
    results.close()
    assert threading.active_count() == before
