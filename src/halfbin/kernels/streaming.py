"""How fast this machine reads memory: the limit of every product that reads its weights once."""

from __future__ import annotations

import statistics
import time

import torch

from halfbin.kernels.cpu import streaming_read

NUM_BYTES = 2**29  # more than a cache holds on most machines
ROUNDS = 7


def read_rate(*, num_bytes: int = NUM_BYTES, rounds: int = ROUNDS) -> float:
    """Bytes a second that torch's number of threads reads from memory: the median of some passes over `num_bytes`."""
    memory = torch.ones(num_bytes, dtype=torch.uint8)
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        streaming_read(memory)
        taken.append(time.perf_counter() - begin)
    return num_bytes / statistics.median(taken)
