"""Peak memory of a calibrated run over the number of layers: it should not grow with them.

    python bench/calibrated_memory.py [--layers 4 8 16] [--hidden 1024] [--samples 16] [--correction 0]

Random Llamas are written (bf16), quantized by GPTQ to int4-g128 in a process of its own, without measuring quality; the highest
anonymous resident memory above the interpreter with its imports is printed beside what the plan said, the float32 size of one
block, of what lies outside the blocks, and of the activations between blocks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = '[[rule]]\nmatch = "*"\nweights = "int4-g128"\nmethod = "gptq"\ncorrection = {}\n'
CHILD = """
import sys
from pathlib import Path
import halfbin as hb
from halfbin.run.memory import MemoryPeak, anonymous_bytes
model, out, recipe, tokens, samples, length, activations = sys.argv[1:]
read = {"calibration": tokens, "num_samples": int(samples), "sample_length": int(length), "activations": activations}
import halfbin.run.html, compressed_tensors
plan = hb.plan(model, recipe=recipe, **read)  # imports the model's class
before = anonymous_bytes()
with MemoryPeak() as peak:
    hb.quantize(model, out, recipe=recipe, evaluate=False, **read)
print("PEAK", peak.bytes - before, plan.peak_memory_bytes)
"""


def peak_bytes(layers: int, options: argparse.Namespace, folder: Path) -> tuple[int, int, int, int]:
    """Peak of a run, what the plan said, and the float32 bytes of a block and of everything outside the blocks."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        vocab_size=2048,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    block = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    rest = sum(4 * p.numel() for p in model.parameters()) - layers * block
    model.save_pretrained(folder / "model")
    del model
    (folder / "gptq.toml").write_text(RECIPE.format(options.correction))
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 2048, (options.samples, options.length)))
    paths = [folder / "model", folder / "out", folder / "gptq.toml", folder / "tokens.npy"]
    arguments = [*map(str, paths), str(options.samples), str(options.length), options.activations]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    peak, planned = map(int, done.stdout.split("PEAK")[1].split())
    return peak, planned, block, rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--correction", type=float, default=0.0, help="a second stream of samples, the float model's, above 0"
    )
    parser.add_argument("--activations", choices=["memory", "disk", "auto"], default="memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    activations = 4 * options.samples * options.length * options.hidden
    results = {}
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            peak, planned, block, rest = peak_bytes(layers, options, Path(folder))
        results[layers] = peak
        print(
            f"{layers:3} layers: peak {peak / 1e6:7.1f} MB, planned {planned / 1e6:.1f}; a block {block / 1e6:.1f}, "
            f"outside the blocks {rest / 1e6:.1f}, activations {activations / 1e6:.1f} MB",
            flush=True,
        )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
