"""Claim: rounding a model needs memory for one tensor, not for the model, and keeps up with 800 MB/s of bf16 weights.

    python bench/streaming.py --gigabytes 2 --work FOLDER

Makes a random Llama checkpoint of several shards (kept in FOLDER for the next run), quantizes it at int4 by round to nearest
without evaluation, and prints: peak anonymous memory above the interpreter with its imports, mapped file pages apart; seconds
of reading, of rounding and packing, of writing; then, on one tensor, rounding and packing beside the naive double loop over
rows and groups in NumPy (timed on a few rows and scaled up). Beside that the disk's own speed in the same run: as many
bytes as the result has, from one buffer in memory, written and put on the disk, and read again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_llama import Shape, make_model

from halfbin.formats.compressed_tensors import COMPRESSED_TENSORS
from halfbin.methods import rtn
from halfbin.run.execute import execute
from halfbin.run.job import Job, planned
from halfbin.run.memory import MemoryPeak, anonymous_bytes
from halfbin.tensor import Scheme, parse_scheme

HIDDEN, INTERMEDIATE = 4096, 11008
ROUNDS = 7
NAIVE_ROWS = 32


def stream(model: Path, output: Path) -> dict[str, Any]:
    """Quantize the whole model; where the time went, and the memory."""
    job = Job(model=str(model), recipe="int4")
    with planned(job):  # everything is imported and has run once
        base = anonymous_bytes() or 0
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    started = time.perf_counter()
    with MemoryPeak() as peak, planned(job) as (plan, checkpoint):
        written = execute(plan, checkpoint, output)
    seconds_in_all = time.perf_counter() - started
    rounded = sum(site.bytes_before for site in plan.sites if site.quantized)
    shutil.rmtree(output)
    output.mkdir()
    disk = disk_seconds(output / "plain", plan.bytes_after)
    shutil.rmtree(output)
    return {
        "input_bytes": plan.bytes_before,
        "rounded_input_bytes": rounded,
        "output_bytes": plan.bytes_after,
        "peak_above_imports_bytes": (peak.bytes or 0) - base,
        "mapped_file_bytes": mapped_bytes(),
        "rounded_gigabytes_per_second": torch.get_num_threads() * rounded / written.seconds["rounding"] / 1e9,
        "seconds_in_all": seconds_in_all,
        "input_gigabytes_per_second": plan.bytes_before / seconds_in_all / 1e9,
        "seconds": dict(written.seconds),
        "disk_seconds_for_the_output": disk,
    }


def disk_seconds(path: Path, num_bytes: int) -> dict[str, float]:
    """What the disk takes for so many bytes: to write them and have them there, and to read them, perhaps from its cache."""
    buffer = memoryview(bytearray(16 * 2**20))
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // len(buffer)):
            file.write(buffer)
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {"writing": written - started, "reading": time.perf_counter() - written}


def mapped_bytes() -> int:
    """Resident pages of mapped files: libraries, and weights if anything mapped them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def rounding(shape: tuple[int, int], scheme: Scheme) -> dict[str, Any]:
    """GB/s of bf16 input rounded and packed, and the naive loop's, interleaved."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    ours, naive = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        COMPRESSED_TENSORS.encode("x.weight", rtn(weight, scheme))
        ours.append(weight.nbytes / (time.perf_counter() - started) / 1e9)
        rows = weight[:NAIVE_ROWS].float().numpy()
        started = time.perf_counter()
        naive_loop(rows, scheme.group_size or rows.shape[1])
        naive.append(NAIVE_ROWS * shape[1] * 2 / (time.perf_counter() - started) / 1e9)
    return {
        "shape": list(shape),
        "gigabytes_per_second": statistics.median(ours),
        "spread": [min(ours), max(ours)],
        "naive_gigabytes_per_second": statistics.median(naive),
    }


def naive_loop(rows: np.ndarray[Any, Any], group: int) -> np.ndarray[Any, Any]:
    """Round to nearest, symmetric int4, packed two codes a byte: as one would write it first."""
    packed = np.empty((rows.shape[0], rows.shape[1] // 2), dtype=np.uint8)
    for i in range(rows.shape[0]):
        for j in range(0, rows.shape[1], group):
            part = rows[i, j : j + group]
            scale = max(float(np.abs(part).max()) / 7, 1e-30)
            codes = np.clip(np.rint(part / scale), -8, 7).astype(np.int8).astype(np.uint8) + 8
            packed[i, j // 2 : (j + group) // 2] = (codes[0::2] & 15) | (codes[1::2] << 4)
    return packed


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounding-only", action="store_true")
    options = parser.parse_args()
    scheme = parse_scheme("int4-g128-bf16")
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    found["rounding"] = [
        rounding(shape, scheme) for shape in ((4096, 4096), (INTERMEDIATE, 4096), (4096, INTERMEDIATE))
    ]
    if not options.rounding_only:
        model = options.work / "model"
        if not (model / "config.json").exists():
            one = Shape(HIDDEN, INTERMEDIATE, heads=32, kv_heads=32, layers=1)
            layers = max(1, round((options.gigabytes * 1e9 - one.end_bytes) / one.layer_bytes))
            make_model(model, replace(one, layers=layers))
        found["stream"] = stream(model, options.work / "out")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
