"""Shares of a list of pieces, each worked through by one thread.

torch's own threads split every single call and wait for each other after it. With a few hundred short calls that is
as fast as this on an idle machine, and a disaster on a busy one, where each wait lasts until the sibling gets its turn:
a 4096 x 4096 weight took 3.5 s on 2 threads and 0.04 s on 1 while five other processes kept the two cores busy. Threads
that each have their own pieces wait once, at the end. torch lets go of the interpreter during each call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(items: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
    """Call `work` with neighbouring shares of `items`, one for each of `torch.get_num_threads()` threads, and wait.

    Inside those threads every torch call runs on the thread that makes it: torch keeps the count for each thread, so the
    caller's stays. What threads born meanwhile would start with is changed too; it is put back before this returns.
    A single item is worked on by the caller.
    """
    count = torch.get_num_threads()
    if len(items) == 1 or count == 1:
        work(items)
        return
    num_shares = min(count, len(items))
    bounds = [len(items) * i // num_shares for i in range(num_shares + 1)]
    shares = [items[first:last] for first, last in itertools.pairwise(bounds)]
    try:
        # Threads are made for each call, at 0.1 ms, and end with it: a pool that is kept does not survive a fork.
        with ThreadPoolExecutor(num_shares, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, shares))
    finally:
        torch.set_num_threads(count)
