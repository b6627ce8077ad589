"""Models with outlier channels, planted without changing the function: what breaks, and what repairs it.

    python bench/outliers.py [--model demo | DIR] [--factor 64] [--channels 3] [--max-tokens 8192] [--text FILE]

A few entries of each norm's weight are multiplied by a power of two, and the matching columns of every linear that reads it
divided by it: exact in any float type. The loss of each recipe is its mean KL to the float model, on the model as it is and on
the planted one. Which linears read a norm is found by the probe, as in a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbin import demo
from halfbin.evaluation import compare
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import Skeleton, load_weights, open_skeleton
from halfbin.models.blocks import Block, find_blocks
from halfbin.models.partial import PartialModel
from halfbin.models.probe import Probe, by_input, find_pairs, scale_producer
from halfbin.models.walk import walk
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.calibration import TOKENS_AT_ONCE, Calibration, samples_for
from halfbin.run.execute import execute
from halfbin.run.measure import evaluation_text, windows_of

RULE = 'layout = "halfbin"\nremainder = "row"\n[[rule]]\nmatch = "*"\n'
RECIPES = {
    "w8a8 per tensor, static": 'weights = "int8-channel"\ninputs = "int8-tensor"\n',
    "  after SmoothQuant": 'weights = "int8-channel"\ninputs = "int8-tensor"\ntransforms = ["smoothquant"]\n',
    "w8a8 per token": 'weights = "int8-channel"\ninputs = "int8-token"\n',
    "  after SmoothQuant ": 'weights = "int8-channel"\ninputs = "int8-token"\ntransforms = ["smoothquant"]\n',
    "LLM.int8()": 'weights = "int8-channel"\ninputs = "int8-token-outliers6"\n',
    "int4-g128": 'weights = "int4-g128"\n',
    "  after AWQ": 'weights = "int4-g128"\ntransforms = ["awq"]\n',
    "  GPTQ": 'weights = "int4-g128"\nmethod = "gptq"\nestimator = "mse"\n',
}


def plant(directory: Path, target: Path, *, factor: float, channels: int) -> None:
    """Write the model of `directory` into `target`, with outliers in every input that a norm gives."""
    skeleton = open_skeleton(directory)
    generator = torch.Generator().manual_seed(0)
    with open_checkpoint(directory) as checkpoint:
        partial = PartialModel(skeleton, checkpoint)
        partial.load(name for name, _ in partial.model.named_parameters())
        blocks = find_blocks(partial.model)
        ids = torch.randint(3, 200, (1, 64), generator=generator)
        for stop in walk(partial.model, blocks, [{"input_ids": ids, "use_cache": False}]):
            with torch.no_grad():
                plant_block(partial, stop.block, stop.handing_on(stop.calls[0]), factor, channels, generator)
                stop.calls[0].output = stop.run(stop.calls[0], final=True)
        tensors = {
            name: partial.get(partial.targets[name].parameter).detach().to(checkpoint.info(name).dtype).clone()
            for name in checkpoint.names
        }
    shutil.copytree(directory, target, dirs_exist_ok=True)
    for old in target.glob("*.safetensors*"):
        old.unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def plant_block(
    partial: PartialModel, block: Block, run: object, factor: float, channels: int, generator: torch.Generator
) -> None:
    prefix = f"{block.name}."
    parameters = {p.removeprefix(prefix): partial.get(p) for p in block.parameters}
    for pair in find_pairs(Probe(parameters, run), block.module, generator):  # type: ignore[arg-type]
        if parameters[pair.producer.parameters[0]].ndim == 1:
            t = torch.ones(pair.producer.num_channels)
            t[torch.randperm(len(t), generator=generator)[:channels]] = factor
            scale_producer(parameters, pair.producer, t)
            for consumer in pair.consumers:
                consumer.place.view(parameters[consumer.place.parameter]).div_(by_input(t, consumer.channels))


def losses(skeleton: Skeleton, text: Path | None, max_tokens: int) -> Iterator[tuple[str, float, float]]:
    """Of each recipe: its name, mean KL and perplexity."""
    windows = windows_of(skeleton, evaluation_text(text, max_tokens))
    original = load_weights(skeleton)
    samples = samples_for(skeleton, Calibration(num_samples=32, length=256))
    for name, rule in RECIPES.items():
        recipe = parse_recipe(RULE + rule, source=name)
        with open_checkpoint(skeleton.path) as checkpoint, tempfile.TemporaryDirectory() as folder:
            plan = make_plan(skeleton, checkpoint, recipe, layout_named("halfbin", skeleton.dtype))
            execute(plan, checkpoint, Path(folder), batches=samples.batches(TOKENS_AT_ONCE))
            found = compare(original, load_weights(skeleton, directory=Path(folder)), windows)
        yield name, found.kl.mean, found.after.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--factor", type=float, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = demo.model_path() if options.model == "demo" else Path(options.model)
    with contextlib.ExitStack() as stack:
        planted = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "planted"
        plant(directory, planted, factor=options.factor, channels=options.channels)
        both = [open_skeleton(directory), open_skeleton(planted)]
        windows = windows_of(both[0], evaluation_text(options.text, 2048))
        same = compare(load_weights(both[0]), load_weights(both[1]), windows)
        print(f"planting moved the float model by a mean KL of {same.kl.mean:.1e} nats", flush=True)
        print(f"{'recipe':28}{'KL as it is':>14}{'KL planted':>14}{'ratio':>9}{'perplexity planted':>20}")
        results = {}
        for (name, before, _), (_, after, perplexity) in zip(
            *(losses(s, options.text, options.max_tokens) for s in both), strict=True
        ):
            results[name.strip()] = {"kl": before, "kl_planted": after, "perplexity_planted": perplexity}
            print(f"{name:28}{before:14.5f}{after:14.5f}{after / before:9.2f}{perplexity:20.3f}", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
