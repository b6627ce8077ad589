"""How fast this machine reads memory: the limit of every product that reads its weights once."""

from __future__ import annotations

import statistics
import time

import torch

from halfbin.kernels import _native

WORDS = 2**26  # 512 MiB: more than a cache holds on most machines
ROUNDS = 7


def read_rate(num_threads: int, *, num_words: int = WORDS, rounds: int = ROUNDS) -> float:
    """Bytes a second that `num_threads` threads read from memory, the median of some passes over `num_words` 8-byte words."""
    words = torch.ones(num_words, dtype=torch.uint64)
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        _native.read_once(words, num_threads)
        taken.append(time.perf_counter() - begin)
    return 8 * num_words / statistics.median(taken)
