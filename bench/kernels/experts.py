"""Claim: the experts of a mixture in one call are faster than a product for each, from one token to many.

    python bench/kernels/experts.py [--experts 8] [--shape 2048x1024] [--top 2] [--tokens 1 4 32 256] [--threads 1 2]
                                    [--rounds 31] [--rotate-mib 96] [--json FILE]

One projection of random int4-g128 experts with a random router's choice, inputs in bfloat16: all experts in one call, the loop
over single products as a model would write it (rows taken out, a product for each expert, rows put back), and torch in
bfloat16: the same loop, and `grouped_mm` with its sorting, which is how transformers runs experts. In each round all take a
turn, weights rotate through `--rotate-mib` of copies. Medians, quartiles and the
least, which is what to look at where others use the cores too, ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbin.kernels import experts, products

GROUP = 128
Call = Callable[[Tensor, Tensor], Tensor]


def loop(num: int, n: int, product: Callable[[Tensor, int], Tensor]) -> Call:
    def call(x: Tensor, chosen: Tensor) -> Tensor:
        y = x.new_empty(*chosen.shape, n)
        for expert in range(num):
            tokens, slots = torch.where(chosen == expert)
            if len(tokens):
                y[tokens, slots] = product(x[tokens], expert)
        return y

    return call


def grouped(weights: Tensor, top: int) -> Call:
    """Sorted by expert, one `grouped_mm`, and back."""
    num, turned = len(weights), weights.transpose(1, 2)

    def call(x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=num).cumsum(0).to(torch.int32)
        y = functional.grouped_mm(x[order // top], turned, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return y[back].view(*chosen.shape, -1)

    return call


def packed(num: int, n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    memory = []
    for _ in range(num):
        codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        scale = (torch.rand(n, k // GROUP, generator=generator) * 0.01 + 0.001).half()
        memory.append(products.pack(codes, scale, None, bits=4, least=-8, group_size=GROUP))
    stack = experts.stack(num, memory[0].numel())
    for i, one in enumerate(memory):
        stack[i] = one
    return stack


def calls(num: int, n: int, k: int, top: int, rotate: int) -> dict[str, list[Call]]:
    """Each way to multiply, over copies of the weights."""
    found: dict[str, list[Call]] = {"experts in one call": [], "a product for each": []}
    for i in range(max(1, rotate // (num * n * k // 2))):
        stack = packed(num, n, k, i)
        found["experts in one call"].append(lambda x, c, s=stack: experts.linear(x, s, c, None, n))
        each = loop(num, n, lambda x, e, s=stack: products.linear(x, s[e], None, n, experts.GRID))
        found["a product for each"].append(each)
    floats: dict[str, list[Call]] = {"torch bf16, loop": [], "torch bf16, grouped_mm": []}
    for _ in range(max(1, rotate // (num * n * k * 2))):
        weights = torch.randn(num, n, k).bfloat16()
        floats["torch bf16, loop"].append(loop(num, n, lambda x, e, w=weights: functional.linear(x, w[e])))
        floats["torch bf16, grouped_mm"].append(grouped(weights, top))
    return found | floats


def measure(found: dict[str, list[Call]], x: Tensor, chosen: Tensor, rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    with torch.inference_mode():
        for call in [call for its in found.values() for call in its]:
            call(x, chosen)
        for turn in range(rounds):
            for name, its in found.items():
                call = its[turn % len(its)]
                start = time.perf_counter()
                call(x, chosen)
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, its in times.items():
        low, middle, high = statistics.quantiles(its, n=4)
        print(f"  {name:24} {middle * 1e3:8.3f} ms  ({low * 1e3:.3f} to {high * 1e3:.3f}; least {min(its) * 1e3:.3f})")
        rows.append({"way": name, "tokens": len(x), "seconds": middle, "quartiles": [low, high], "least": min(its)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shape", default="2048x1024")
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 32, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--rotate-mib", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    n, k = (int(size) for size in options.shape.split("x"))
    rows: list[dict[str, Any]] = []
    found = calls(options.experts, n, k, options.top, options.rotate_mib << 20)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for m in options.tokens:
            generator = torch.Generator().manual_seed(m)
            x = torch.randn(m, k, generator=generator).bfloat16()
            chosen = torch.rand(m, options.experts, generator=generator).topk(options.top).indices
            print(f"\n{options.experts} experts of {n} x {k}, top {options.top}, {m} tokens, {threads} threads")
            rows += [row | {"threads": threads} for row in measure(found, x, chosen, options.rounds)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
