"""Claim: the experts of any model that transformers merges into stacks compute with codes as their dequantized weights do.

    python bench/experts.py [--only NAME ...]

For each causal-LM class whose code speaks of experts, a tiny random model is quantized (experts alone, int4 in groups of 32),
loaded with its codes and dequantized, and both run on 16 tokens. Told are the modules of experts with codes, the reasons of
those without, and the largest difference of logits over the largest logit, with float inputs (EXACT) and with inputs rounded
to INT8. The latter is large where a router's choice was near a tie.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import causal_classes, run, tiny_model

import halfbin as hb
from halfbin.models import load_weights, open_skeleton
from halfbin.models.running import load_running
from halfbin.nn import EXACT, ExpertStack, QuantExperts

RECIPE = 'layout = "halfbin"\n[[rule]]\nmatch = "role:expert"\nweights = "int4-g32"\n'


def compare(config_class: Any, model_class: Any, work: Path) -> str:
    tiny_model(config_class, model_class).save_pretrained(work / "model")
    (work / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    hb.quantize(work / "model", work / "out", recipe=work / "recipe.toml", evaluate=False)
    skeleton = open_skeleton(work / "out")
    running = load_running(skeleton, dtype=torch.float32)
    ids = torch.arange(3, 19)[None]
    expected, rounded = run(load_weights(skeleton), ids), run(running.model, ids)
    for module in running.model.modules():
        if isinstance(module, ExpertStack):
            module.choose(EXACT)
    exact = run(running.model, ids)
    modules = sum(isinstance(module, QuantExperts) for module in running.model.modules())
    off = [float((y - expected).abs().max() / expected.abs().max()) for y in (exact, rounded)]
    reasons = "; ".join(sorted({reason.rpartition("; ")[2] for reason in running.dequantized.values()}))
    return f"{modules} modules with codes, off by {off[0]:.1e} exact, {off[1]:.1e} rounded  {reasons}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, (config_class, model_class) in causal_classes().items():
        speaks = "xpert" in inspect.getsource(sys.modules[model_class.__module__])
        if not speaks or (options.only and name not in options.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                told = compare(config_class, model_class, Path(work))
            except Exception as error:  # whatever a class's own code raises is the finding
                told = f"failed: {type(error).__name__}: {error!s:.150}"
        print(f"{name:36} {told}", flush=True)


if __name__ == "__main__":
    main()
