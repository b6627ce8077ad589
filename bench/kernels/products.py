"""How long a product with quantized weights takes, beside other libraries' and a streaming read, in one run.

    python bench/kernels/products.py [--shapes 4096x4096 ...] [--tokens 1 4 16 128 512] [--threads 1 2] [--rounds 7]
                                     [--rotate-mib 256] [--only NAME ...] [--clock wall|cpu] [--json FILE]

Each round goes through all of them once, behind a reading of the probe, 512 MiB in order on as many threads; weights rotate
through `--rotate-mib` of copies, so that none is in L2 when its turn comes (a shared L3 may be larger). The process is pinned
to the first cores. Medians over rounds, and the quartiles beside them. `share` is bytes of weights over time, divided by the
probe's rate. On a machine that others use, `--clock cpu` counts the processor time of all threads, divided by their number:
what others take from a thread's turn is left out, what they take from caches and memory is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peers import GROUP, PEERS, Call, Peer
from torch import Tensor

from halfbin.kernels.cpu import streaming_read

PROBE = 1 << 29  # bytes
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008", "14336x4096"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rotate-mib", type=int, default=256)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = [p for p in PEERS if p.installed and (not options.only or any(o in p.name for o in options.only))]
    probe = torch.ones(PROBE, dtype=torch.uint8)
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        os.sched_setaffinity(0, range(threads))
        torch.set_num_threads(threads)
        for shape in options.shapes:
            n, k = (int(size) for size in shape.split("x"))
            calls = {peer.name: copies(peer, n, k, threads, options.rotate_mib << 20) for peer in peers}
            for m in options.tokens:
                rows += measure(peers, calls, torch.randn(m, k), n, threads, options.rounds, probe, options.clock)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def copies(peer: Peer, n: int, k: int, threads: int, rotate: int) -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    limit = 2 ** (peer.bits - 1)
    codes = torch.randint(-limit, limit, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, k // GROUP if peer.bits == 4 else 1, generator=generator) * 0.01 + 0.001
    count = max(1, rotate // int(n * k * peer.bits_per_weight / 8))
    return [peer.make(codes, scale, threads) for _ in range(count)]


def measure(
    peers: list[Peer],
    calls: dict[str, list[Call]],
    x: Tensor,
    n: int,
    threads: int,
    rounds: int,
    probe: Tensor,
    clock: str,
) -> list[dict[str, Any]]:
    m, k = x.shape
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    rates = []

    def seconds(call: Any) -> float:
        start = CLOCKS[clock]()
        call()
        return (CLOCKS[clock]() - start) / (threads if clock == "cpu" else 1)

    with torch.inference_mode():
        for call in [call for peer in peers for call in calls[peer.name]]:
            call(x)  # some libraries prepare for a shape when they first meet it
        for turn in range(rounds):
            rates.append(PROBE / seconds(lambda: streaming_read(probe)))
            first = turn % len(peers)  # whoever follows the probe finds the caches full of it
            for peer in peers[first:] + peers[:first]:
                ready = calls[peer.name]
                call = ready[(turn + 1) % len(ready)]
                times[peer.name].append(seconds(lambda call=call: call(x)))
    rate = statistics.median(rates)
    print(f"\n{n} x {k}, {m} tokens, {threads} threads; the probe reads {rate / 1e9:.1f} GB/s")
    rows = []
    for peer in peers:
        low, middle, high = statistics.quantiles(times[peer.name], n=4)
        read = n * k * peer.bits_per_weight / 8 / middle
        row = {"n": n, "k": k, "tokens": m, "threads": threads, "peer": peer.name, "bits": peer.bits, "seconds": middle}
        row |= {"quartiles": [low, high], "probe": rate, "share": read / rate, "tops": 2 * m * n * k / middle / 1e12}
        rows.append(row)
        print(
            f"  {peer.name:26} {middle * 1e3:8.2f} ms  ({low * 1e3:.2f} to {high * 1e3:.2f})  "
            f"{read / rate:6.0%} of the probe  {row['tops']:6.2f} TOPS",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
