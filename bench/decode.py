"""Claim: a model in int4 decodes at least 2.8 times, and reads a prompt at least twice, as fast as in bf16 by torch.

    python bench/decode.py --work FOLDER [--recipe int4] [--threads N] [--rounds 5] [--llama-python PYTHON] [--json]

A random checkpoint in TinyLlama-1.1B's shape (a token reads 2.07 GB of bf16 weights, 0.63 GB in int4 with a 16-bit head),
quantized, then timed by `halfbin bench`: codes, the same weights as floats, and a pass over memory, in one run. With
--llama-python, a Python that has llama-cpp-python and gguf, llama.cpp runs the same weights in Q4_0, the head in F16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from random_llama import TINYLLAMA, make_model

import halfbin as hb
from halfbin.cli.bench_table import bench_table
from halfbin.cli.screen import results

HERE = Path(__file__).parent


def llama_cpp(python: Path, model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What llama.cpp's process says of its times."""
    command = [python, HERE / "decode_llama_cpp.py", model, work / "q4_0.gguf"]
    command += [str(n) for n in (options.threads, options.prompt, options.new_tokens, options.rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, output = options.work / "tinyllama", options.work / Path(options.recipe).stem
    if not (model / "config.json").exists():
        make_model(model, TINYLLAMA)
    if not output.exists():
        hb.quantize(model, output, recipe=options.recipe, evaluate=False)
    found = hb.bench(
        output,
        prompt_tokens=options.prompt,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        threads=options.threads,
    )
    told = found.to_json()
    told.pop("layers")
    if options.llama_python:
        told["llama.cpp Q4_0"] = llama_cpp(options.llama_python, model, options.work, options)
    if not options.json:
        results().print(bench_table(found))
    print(json.dumps({k: v for k, v in told.items() if options.json or k.startswith("llama")}, indent=1))


if __name__ == "__main__":
    main()
