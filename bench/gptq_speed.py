"""Claim: a 4096 x 4096 weight at int4-g128 takes 6.1 s or less from 16,384 rows of activations to codes, on 2 threads, and the
second moment is made at 80 % or more of the rate of the machine's matrix product.

    python bench/gptq_speed.py [--repeats 5] [--features 4096] [--tokens 16384] [--sample 2048] [--threads 2]

The steps and a product of two 4096 x 4096 matrices take turns, and of each the fastest round counts: others may use the machine
too. The useful work of the second moment is n^2 multiplications and additions for a token, half of a full product's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbin.calibration import SecondMoment
from halfbin.methods import Factor, factorise, gptq
from halfbin.tensor import parse_scheme

PROBE = 4096


def activations(tokens: int, features: int, sample: int) -> list[Tensor]:
    """Samples whose channels differ in size, so that the order of rounding is no order of the weight."""
    generator = torch.Generator().manual_seed(0)
    sizes: Tensor = torch.logspace(-0.5, 0.5, features)[torch.randperm(features, generator=generator)]
    return [torch.randn(sample, features, generator=generator) * sizes for _ in range(tokens // sample)]


def observe(samples: list[Tensor]) -> SecondMoment:
    """All samples through one observer."""
    moment = SecondMoment(samples[0].shape[1])
    for x in samples:
        moment.add(x)
    return moment


def measure(samples: list[Tensor], out_features: int, scheme: str, repeats: int) -> dict[str, Any]:
    """Seconds of each step, the fastest and the middle of all rounds."""
    weight = torch.randn(out_features, samples[0].shape[1], generator=torch.Generator().manual_seed(1)) * 0.02
    left, right, product = torch.randn(PROBE, PROBE), torch.randn(PROBE, PROBE), torch.empty(PROBE, PROBE)
    rounding = parse_scheme(scheme)
    seconds: dict[str, list[float]] = {"sgemm": [], "second_moment": [], "factorise": [], "column_loop": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - started)
        return result

    for _ in range(repeats):
        timed("sgemm", lambda: torch.mm(left, right, out=product))
        matrix: Tensor = timed("second_moment", lambda: observe(samples).matrix())
        factor: Factor = timed("factorise", lambda matrix=matrix: factorise(matrix))
        timed("column_loop", lambda factor=factor: gptq(weight, rounding, factor))
    return {name: {"fastest": min(found), "median": statistics.median(found)} for name, found in seconds.items()}


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sample", type=int, default=2048)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples = activations(options.tokens, options.features, options.sample)
    seconds = measure(samples, options.out_features, options.scheme, options.repeats)
    rate = 2 * PROBE**3 / seconds["sgemm"]["fastest"]
    useful = options.features**2 * sum(len(x) for x in samples) / seconds["second_moment"]["fastest"]
    steps = ("second_moment", "factorise", "column_loop")
    found = {
        "threads": options.threads,
        "sgemm_gflops": rate / 1e9,
        "second_moment_gflops": useful / 1e9,
        "second_moment_share_of_sgemm": useful / rate,
        "seconds": {name: {k: round(v, 3) for k, v in seconds[name].items()} for name in steps},
        "total_seconds": sum(seconds[name]["fastest"] for name in steps),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
