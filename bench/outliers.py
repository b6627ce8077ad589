"""Models with outlier channels, planted without changing the function: what breaks, and what repairs it.

    python bench/outliers.py [--model demo | DIR] [--factor 64] [--channels 3] [--max-tokens 8192] [--text FILE]
                              [--context TOKENS] [--calibration FILE] [--recipes PART] [--json]

A few entries of each norm's weight are multiplied by a power of two, and the matching columns of every linear that reads it
divided by it: exact in any float type. The loss of each recipe is its mean KL to the float model, on the model as it is and on
the planted one. Which linears read a norm is found by the probe, as in a run. Last comes what LLM.int8() has over w8a8 per
token: the difference of their KL with a 95 % interval over windows, in pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbin import demo
from halfbin.evaluation import compare, paired_difference
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import Skeleton, load_weights, open_skeleton, untied
from halfbin.models.blocks import Block, find_blocks
from halfbin.models.partial import PartialModel
from halfbin.models.probe import Probe, by_input, find_pairs, scale_producer
from halfbin.models.walk import walk
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.calibration import TOKENS_AT_ONCE, Calibration, samples_for
from halfbin.run.execute import execute
from halfbin.run.measure import evaluation_text, windows_of

RULE = 'layout = "halfbin"\nuntie = true\nremainder = "row"\n[[rule]]\nmatch = "*"\n'
RECIPES = {
    "w8a8 per tensor, static": 'weights = "int8-channel"\ninputs = "int8-tensor"\n',
    "w8a8 per tensor, SmoothQuant": 'weights = "int8-channel"\ninputs = "int8-tensor"\ntransforms = ["smoothquant"]\n',
    "w8a8 per token": 'weights = "int8-channel"\ninputs = "int8-token"\n',
    "w8a8 per token, SmoothQuant": 'weights = "int8-channel"\ninputs = "int8-token"\ntransforms = ["smoothquant"]\n',
    "w8a8 per token, rotated": 'weights = "int8-channel"\ninputs = "int8-token"\ntransforms = ["rotate"]\n',
    "w4a4 per token": 'weights = "int4-channel"\ninputs = "int4-token"\n',
    "w4a4 per token, rotated": 'weights = "int4-channel"\ninputs = "int4-token"\ntransforms = ["rotate"]\n',
    "LLM.int8()": 'weights = "int8-channel"\ninputs = "int8-token-outliers6"\n',
    "int4-g128": 'weights = "int4-g128"\n',
    "int4-g128, AWQ": 'weights = "int4-g128"\ntransforms = ["awq"]\n',
    "int4-g128, GPTQ": 'weights = "int4-g128"\nmethod = "gptq"\nestimator = "mse"\n',
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


@dataclass(frozen=True)
class Loss:
    """What a recipe lost: mean KL, KL of each window, perplexity before and after, columns kept in 16 bits, bits per weight."""

    kl: float
    by_window: Tensor
    float_perplexity: float
    perplexity: float
    columns: int
    bits: float


def losses(skeleton: Skeleton, options: argparse.Namespace) -> Iterator[tuple[str, Loss]]:
    """Of each recipe: its name and what it lost."""
    windows = windows_of(skeleton, evaluation_text(options.text, options.max_tokens), context=options.context)
    original = load_weights(skeleton)
    samples = samples_for(skeleton, Calibration(path=options.calibration, num_samples=32, length=256))
    for name, rule in RECIPES.items():
        if options.recipes not in name:
            continue
        recipe = parse_recipe(RULE + rule, source=name)
        with open_checkpoint(skeleton.path) as checkpoint, tempfile.TemporaryDirectory() as folder:
            model = untied(skeleton, checkpoint.names)  # rotation turns an embedding and a head differently
            checkpoint.add_copies(model.copies)
            plan = make_plan(model, checkpoint, recipe, layout_named("halfbin", skeleton.dtype))
            written = execute(plan, checkpoint, Path(folder), batches=samples.batches(TOKENS_AT_ONCE))
            found = compare(original, load_weights(model, directory=Path(folder)), windows)
        assert found.by_window is not None
        rounded = [s for s in plan.with_columns(written.columns).sites if s.quantized]
        bits = 8 * sum(s.bytes_after for s in rounded) / sum(s.site.num_weights for s in rounded)
        columns = sum(s.columns.count for s in rounded if s.columns is not None)
        yield (
            name,
            Loss(found.kl.mean, found.by_window.kl, found.before.value, found.after.value, columns, bits),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--factor", type=float, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, help="tokens of a window")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; what comes with halfbin by default")
    parser.add_argument("--recipes", default="", help="only those with this in their names")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = demo.model_path() if options.model == "demo" else Path(options.model)
    with contextlib.ExitStack() as stack:
        planted = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "planted"
        plant(directory, planted, factor=options.factor, channels=options.channels)
        both = [open_skeleton(directory), open_skeleton(planted)]
        windows = windows_of(both[0], evaluation_text(options.text, 2048), context=options.context)
        same = compare(load_weights(both[0]), load_weights(both[1]), windows)
        print(f"planting moved the float model by a mean KL of {same.kl.mean:.1e} nats", flush=True)
        print(f"{'':30}{'KL':>10}{'planted':>10}{'ratio':>8}{'perplexity':>12}{'columns':>9}{'bits':>7}{'planted':>14}")
        results: dict[str, list[Loss]] = {}
        measured = (losses(s, options) for s in both)
        for (name, before), (_, after) in zip(*measured, strict=True):
            results[name] = [before, after]
            print(
                f"{name:30}{before.kl:10.5f}{after.kl:10.5f}{after.kl / before.kl:8.2f}"
                f"{before.perplexity / before.float_perplexity - 1:+12.3%}{before.columns:9}{before.bits:7.3f}"
                f"{after.columns:7}{after.bits:7.3f}",
                flush=True,
            )
    pair = {"LLM.int8()", "w8a8 per token"}
    for i, where in enumerate(("as it is", "planted") if pair <= set(results) else ()):
        ours, theirs = results["LLM.int8()"][i], results["w8a8 per token"][i]
        gap = paired_difference(ours.by_window, theirs.by_window)
        print(f"LLM.int8() - w8a8 per token, {where}: KL {gap.mean:+.2e} [{gap.low:+.2e}, {gap.high:+.2e}]")
    if options.json:
        told = {
            name: [vars(loss) | {"by_window": loss.by_window.tolist()} for loss in pair]
            for name, pair in results.items()
        }
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
