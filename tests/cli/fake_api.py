"""The api as the command line calls it, without models: results at once, and failures on demand.

As a program it runs the command line on this fake: `python fake_api.py ARGUMENTS`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped] # ships no types

CALLS: list[dict[str, Any]] = []
OUTCOMES: dict[str, BaseException] = {}
"""What a verb raises when its model has this name."""


def quantize(model: str, output: Path, **options: Any) -> Any:
    from halfbin.errors import LimitError
    from halfbin.run.events import Event
    from run.example_report import example_report

    CALLS.append({"verb": "quantize", "model": model, "output": output, **options})
    sys.stdout.write("a library talks to stdout\n")
    warnings.warn("a library warns", stacklevel=1)
    for _ in tqdm([1], disable=False):
        pass
    _maybe_fail(model)
    if on_event := options["on_event"]:
        for done in range(4):
            on_event(Event("quantizing", done * 1000, 3000, "bytes", "model.layers.0"))
        on_event(Event("evaluating", 1, 2, "windows"))
    if model == "hang":
        sys.stderr.write("ready\n")
        sys.stderr.flush()
        time.sleep(60)
    report = dataclasses.replace(example_report(), model=model, output=str(output))
    output.mkdir(parents=True, exist_ok=True)
    report.write(output / "report.json")
    if options.get("max_kl") is not None:
        raise LimitError("mean KL is 0.1432 nats, above --max-kl")
    return report


def plan(model: str, **options: Any) -> Any:
    CALLS.append({"verb": "plan", "model": model, **options})
    _maybe_fail(model)
    return types.SimpleNamespace(to_json=lambda: plan_json(32))


def inspect(path: str, **options: Any) -> Any:
    CALLS.append({"verb": "inspect", "path": path, **options})
    _maybe_fail(path)
    return example_inspection(path)


def evaluate(a: str, b: str | None = None, **options: Any) -> Any:
    from halfbin.evaluation import Comparison, Perplexity
    from halfbin.evaluation.compare import Spread
    from halfbin.evaluation.windows import cut

    CALLS.append({"verb": "evaluate", "a": a, "b": b, **options})
    _maybe_fail(a)
    how = cut(range(100), context=9, stride=4, bos=0).definition
    before, after = Perplexity(4.0, 1.386294, 100, None, how), Perplexity(5.0, 1.609438, 100, None, how)
    if b is None:
        return before
    return Comparison(before, after, Spread(0.1, 0.05, 0.9, 3.0), 0.84, 100, how)


def bench(model: str, **options: Any) -> Any:
    from halfbin.evaluation.speed import Speed, Times
    from halfbin.run.benchmark import Benchmark, LayerKernel, Runner

    CALLS.append({"verb": "bench", "model": model, **options})
    _maybe_fail(model)

    def runner(name: str, seconds: float, num_bytes: int) -> Runner:
        speed = Speed(256, 32, 5, Times(8 * seconds, seconds, 9 * seconds), Times(seconds, seconds, 2 * seconds))
        return Runner(name, speed, num_bytes, 3 * num_bytes)

    layers = tuple(
        LayerKernel(
            f"model.layers.{i}.up_proj", (64, 32), "nf4-g64", "reference", {"int8-inputs": "nf4 codes are no integers"}
        )
        for i in range(3)
    )
    left = {"model.layers.0.experts.w1": "it is merged with others"}
    return Benchmark(
        model, "bf16", 2, runner("codes", 0.01, 10**8), runner("floats", 0.03, 4 * 10**8), 4e10, layers, left
    )


def plan_json(num_layers: int) -> dict[str, Any]:
    sites = [_planned("model.embed_tokens", [512, 64], "bfloat16", "embedding: kept unless a rule names it")]
    for layer in range(num_layers):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            sites.append(_planned(f"model.layers.{layer}.{name}", [64, 64], "int4-g32-f16", "rule '*'"))
    return {
        "model": "tiny",
        "recipe": "int4",
        "layout": "compressed-tensors",
        "input_bytes": sum(site["bytes_before"] for site in sites),
        "output_bytes": sum(site["bytes_after"] for site in sites),
        "peak_memory_bytes": 12_345_678,
        "sites": sites,
    }


def _planned(name: str, shape: list[int], weights: str, reason: str) -> dict[str, Any]:
    quantized = weights.startswith("int")
    num_weights = shape[0] * shape[1]
    return {
        "name": name,
        "role": "linear",
        "shape": shape,
        "weights": weights,
        "quantized": quantized,
        "method": "rtn" if quantized else None,
        "reason": reason,
        "bytes_before": 2 * num_weights,
        "bytes_after": num_weights * 9 // 16 if quantized else 2 * num_weights,
    }


def example_inspection(path: str) -> Any:
    import torch

    from halfbin.run.inspection import Inspection, TensorInspection, code_use
    from halfbin.tensor.qtensor import quantize as round_tensor
    from halfbin.tensor.scheme import parse_scheme

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    use = code_use(round_tensor(weight, parse_scheme("int4-g32")))
    codes = TensorInspection(name="a.weight", shape=(64, 64), bytes=2560, scheme="int4-g32", codes=use)
    norm = TensorInspection(name="norm.weight", shape=(64,), bytes=128, dtype="bfloat16")
    return Inspection(path=path, layout="halfbin", bytes=2688, tensors=(codes, norm))


def _maybe_fail(model: str) -> None:
    if model in OUTCOMES:
        raise OUTCOMES[model]
    if model == "fault":
        raise ZeroDivisionError("a planted fault")


def install() -> None:
    """Put this module in the api's place."""
    import halfbin

    fake = sys.modules[__name__]
    sys.modules["halfbin.api"] = fake
    halfbin.api = fake


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root / "src"), str(root / "tests")]
    os.environ.setdefault("COLUMNS", "120")
    install()
    from halfbin.cli import main

    main()
