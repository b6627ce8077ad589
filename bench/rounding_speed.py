"""Claim: rounding a float32 weight to int4 in groups of 128, and packing it, costs one reading of it.

    python bench/rounding_speed.py [--rounds 15] [--rows 4096] [--columns 4096] [--threads 1]

Every instruction set that runs here, a streaming read (a sum) of the same weight, the same with a write of as many bytes as
packed codes and scales have, and the loop over rows and groups that one
would write first in NumPy (on 32 rows, scaled up) take turns; of each the middle and the fastest round counts. With one thread,
time is the thread's own: others may use the machine too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from streaming import NAIVE_ROWS, naive_loop

from halfbin.kernels.errors import error_sums
from halfbin.kernels.instruction_sets import usable
from halfbin.kernels.packed_rounding import fit_round_and_pack_rows
from halfbin.kernels.rounding import fit_and_round_rows
from halfbin.tensor import parse_scheme
from halfbin.tensor.rowwise import encoder, fit_rule

GROUP = 128


def measure(rows: int, columns: int, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """GB/s of float32 input."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    scheme = parse_scheme(f"int4-g{GROUP}")
    fit, coding = fit_rule(scheme), encoder(scheme.format)
    found = fit_and_round_rows(x, GROUP, fit, coding)
    assert found is not None
    codes, scale, _ = found
    packed = torch.empty(codes.numel() // 2, dtype=torch.uint8)
    work: dict[str, Callable[[], Any]] = {
        "streaming read": x.sum,
        "streaming read, and a write of what is packed": lambda: (x.sum(), packed.fill_(1), scale.fill_(1)),
    }
    for name in usable():
        work[f"codes, {name}"] = lambda name=name: fit_and_round_rows(x, GROUP, fit, coding, instruction_set=name)
        for compare in (False, True):
            work[f"packed{' and compared' * compare}, {name}"] = lambda name=name, compare=compare: (
                fit_round_and_pack_rows(x, GROUP, fit, coding, bits=4, lowest=-8, compare=compare, instruction_set=name)
            )
        work[f"error sums, {name}"] = lambda name=name: error_sums(
            x,
            codes,
            scale,
            None,
            GROUP,
            decode=scheme.format.decode,
            code_format=coding.format,
            instruction_set=name,
        )
    rates: dict[str, list[float]] = {name: [] for name in (*work, "naive loop")}
    some = x[:NAIVE_ROWS].numpy()
    for _ in range(rounds):
        for name, once in work.items():
            started = clock()
            once()
            rates[name].append(x.nbytes / (clock() - started) / 1e9)
        started = clock()
        naive_loop(some, GROUP)
        rates["naive loop"].append(some.nbytes / (clock() - started) / 1e9)
    return {name: {"median": round(statistics.median(r), 3), "best": round(max(r), 3)} for name, r in rates.items()}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(json.dumps(measure(options.rows, options.columns, options.rounds, clock), indent=1))


if __name__ == "__main__":
    main()
