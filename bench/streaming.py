"""Claim: rounding a model needs memory for one tensor, not for the model, and keeps up with 800 MB/s of bf16 weights.

    python bench/streaming.py --gigabytes 2 --work FOLDER

Makes a random Llama checkpoint of several shards (kept in FOLDER for the next run), quantizes it at int4 by round to nearest
without evaluation, and prints: peak anonymous memory above the interpreter with its imports, mapped file pages apart; seconds
of reading, of rounding and packing, of writing; then, on one tensor, rounding and packing beside the naive double loop over
rows and groups in NumPy (timed on a few rows and scaled up).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbin.formats.compressed_tensors import COMPRESSED_TENSORS
from halfbin.formats.safetensors import SafetensorsWriter
from halfbin.methods import rtn
from halfbin.run.execute import execute
from halfbin.run.job import Job, planned
from halfbin.run.memory import MemoryPeak, anonymous_bytes
from halfbin.tensor import Scheme, parse_scheme

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
ROUNDS = 7
NAIVE_ROWS = 32


def make_model(folder: Path, gigabytes: float) -> None:
    """A Llama of random bf16 weights in shards of about half a gigabyte, with its config."""
    folder.mkdir(parents=True, exist_ok=True)
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    ends = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    num_layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    shards: list[dict[str, tuple[int, ...]]] = [ends]
    shards += [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(num_layers)]
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for i, shapes in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        with SafetensorsWriter(folder / name, {n: (torch.bfloat16, s) for n, s in shapes.items()}) as writer:
            for tensor, shape in shapes.items():
                writer.write(tensor, torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


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
    rounded = sum(site.bytes_before for site in plan.sites if site.quantized)
    shutil.rmtree(output)
    return {
        "input_bytes": plan.bytes_before,
        "rounded_input_bytes": rounded,
        "output_bytes": plan.bytes_after,
        "peak_above_imports_bytes": (peak.bytes or 0) - base,
        "mapped_file_bytes": mapped_bytes(),
        "rounded_gigabytes_per_second": torch.get_num_threads() * rounded / written.seconds["rounding"] / 1e9,
        "seconds_in_all": time.perf_counter() - started,
        "seconds": dict(written.seconds),
    }


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
            make_model(model, options.gigabytes)
        found["stream"] = stream(model, options.work / "out")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
