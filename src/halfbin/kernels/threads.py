"""Threads that each have work of their own, instead of sharing every single torch call.

torch's own threads split each call and wait for each other after it. With a few hundred short calls that is as fast as this on
an idle machine, and a disaster on a busy one, where each wait lasts until the sibling gets its turn: a 4096 x 4096 weight took
3.5 s on 2 threads and 0.04 s on 1 while five other processes kept the two cores busy. And while they wait they spin: a weight
of 11008 x 4096 that was rounded in 22 parts with both kinds of threads took 400 ms of processor time, in one part 130 ms.
torch lets go of the interpreter during each call, so Python's threads do.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_threads(items: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
    """Call `work` with neighbouring shares of `items`, one for each of `torch.get_num_threads()` threads, and wait.

    A single item, or none, is left to the caller's thread.
    """
    count = torch.get_num_threads()
    if len(items) < 2 or count == 1:
        work(items)
        return
    num_shares = min(count, len(items))
    bounds = [len(items) * i // num_shares for i in range(num_shares + 1)]
    shares = [items[first:last] for first, last in itertools.pairwise(bounds)]
    with _pool(num_shares) as pool:
        list(pool.map(work, shares))


def in_turns(items: Iterable[T], work: Callable[[T], None]) -> None:
    """Call `work` on each item, on `torch.get_num_threads()` threads that take the next one as they come free, and wait.

    For items that take long and differ in time, the longest ones first: where another process holds up one thread, the others
    go on. A single item, or none, is left to the caller's thread.
    """
    waiting = list(items)
    places = itertools.count()  # of the next item; taking a number from it is one step of the interpreter

    def until_none_is_left(_: object) -> None:
        while (place := next(places)) < len(waiting):
            work(waiting[place])

    in_threads(range(min(torch.get_num_threads(), len(waiting))), until_none_is_left)


def in_order(
    items: Iterable[T], work: Callable[[T], R], *, num_bytes: Callable[[T], int], in_flight: int
) -> Generator[tuple[T, R], None, None]:
    """Call `work` on each item, on `torch.get_num_threads()` threads, and give the results in the order of the items.

    Args:
      items: asked for as results are taken, from the caller's thread.
      work: an error in it comes out where its result would.
      num_bytes: memory that an item and its result take.
      in_flight: no further item is begun while those begun and not yet given take more bytes than this. Results are given as
        soon as they are there, so that it is reached only where the caller is slower than the threads.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    begun = 0
    remaining = iter(items)
    with _pool(torch.get_num_threads()) as pool:
        try:
            for item in remaining:
                while waiting and (waiting[0][1].done() or begun + num_bytes(item) > in_flight):
                    done, result = waiting.popleft()
                    yield done, result.result()
                    begun -= num_bytes(done)
                waiting.append((item, pool.submit(work, item)))
                begun += num_bytes(item)
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads inside which every torch call runs on the thread that makes it.

    torch keeps that count for each thread, so the caller's stays. What threads born meanwhile would start with is changed
    too; it is put back at the end. The threads end with the block, at 0.1 ms: a pool that is kept does not survive a fork.
    """
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)
