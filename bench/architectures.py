"""Every causal-LM class that transformers knows, through halfbin's methods: a tiny random model of each, end to end.

    python bench/architectures.py --work DIR [--methods rtn gptq awq smoothquant] [--only NAME ...] [--timeout 120]

For each class a model is made (tiny_models.py), checked to run in float, saved, quantized, loaded by plain transformers, and
held against the dequantized weights. A method passes where
  - the written directory loads without a missing or unexpected tensor,
  - transformers' logits equal those of halfbin's reading within float32 rounding,
  - at least one linear was quantized,
  - for awq and smoothquant, with a scale for each weight of its own (int8-g1, halfbin's layout: no weight moves), the logits
    stay what they were: the transforms changed the weights and not the function.
Sites that no data reached (cross-attention without an encoder, experts without tokens) and models in which no scale could move
are counted beside that.
Where the layout compressed-tensors refuses a model, halfbin's own layout is tried, and the table says so.

Each result is a line of DIR/results.jsonl; what is there is not run again. Every class runs in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_models import VOCABULARY, causal_classes, run, tiny_model

from halfbin.errors import HalfbinError
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.models import load_as_client, load_weights, open_skeleton
from halfbin.planning import make_plan, parse_recipe
from halfbin.run.client import settle_client
from halfbin.run.execute import execute

COARSE = 'remainder = "row"\n[[rule]]\nmatch = "*"\nweights = "int4-g32"\nmethod = "{}"\n'
FINE = "".join(
    f'[[rule]]\nmatch = "role:{role}"\nweights = "int8-g1"\ntransforms = ["{{}}"]\n' for role in ("linear", "expert")
)
RECIPES = {
    "rtn": COARSE.format("rtn"),
    "gptq": COARSE.format("gptq"),
    "awq": FINE.format("awq", "awq"),
    "smoothquant": FINE.format("smoothquant", "smoothquant"),
}
FORK = multiprocessing.get_context("fork")  # importing transformers anew takes longer than most classes
EQUAL = 2e-5  # float32 rounding of a few layers, relative to the largest logit
UNCHANGED = 1e-3  # float32 rounding of weights that were scaled, through routers and recurrences; relative, by norm


def one_class(name: str, methods: list[str], work: Path) -> list[dict[str, Any]]:
    """All methods on one class; an entry for each, or one alone that says why it does not run in float."""
    config_class, model_class = causal_classes()[name]
    try:
        model = tiny_model(config_class, model_class)
    except Exception as error:
        return [{"class": name, "method": "float", "status": "no float", "reason": str(error)}]
    directory = work / name
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, VOCABULARY, (8, 4, 24)))
    expected = run(model, ids[0])
    model.save_pretrained(directory)
    results: list[dict[str, Any]] = [{"class": name, "method": "float", "status": "pass"}]
    for method in methods:
        try:
            found = one_method(directory, method, list(ids), expected)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            found = {"status": "fail", "reason": reason, "expected": isinstance(error, HalfbinError)}
        results.append({"class": name, "method": method} | found)
    return results


def one_method(directory: Path, method: str, batches: list[torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
    rules = parse_recipe(RECIPES[method], source=method)
    skeleton = open_skeleton(directory)
    layouts = ["halfbin"] if method in ("awq", "smoothquant") else ["compressed-tensors", "halfbin"]
    refused = ""
    for layout in layouts:
        with open_checkpoint(directory) as checkpoint, tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            try:
                plan = make_plan(skeleton, checkpoint, rules, layout_named(layout, skeleton.dtype))
                written = execute(plan, checkpoint, out, batches=batches)
                settle_client(plan, out)
            except HalfbinError as error:
                refused = refused or f"{layout}: {error}".replace("\n", " ")[:200]
                continue
            if not any(s.quantized for s in plan.sites):
                refused = refused or f"{layout}: nothing could be quantized"
                continue
            ours = run(load_weights(skeleton, directory=out), batches[0])
            client = (
                ours if layout == "halfbin" else run(load_as_client(skeleton, out, dtype=torch.float32), batches[0])
            )
        apart = float((ours - client).abs().max() / ours.abs().max())
        moved = float((ours - expected).norm() / expected.norm())
        remarks = sum(bool(d.remarks) for d in written.calibrated.values())
        transformed = sum(d.transformed for d in written.calibrated.values())
        quantized = sum(s.quantized for s in plan.sites)
        linear = sum(s.site.role in ("linear", "expert") for s in plan.sites)
        problems = [
            *([f"client's logits differ by {apart:.1e}"] if apart > EQUAL else []),
            *([f"logits moved by {moved:.2f}"] if "transforms" in RECIPES[method] and not moved < UNCHANGED else []),
        ]
        return {
            "status": "fail" if problems else "pass",
            "reason": "; ".join(problems),
            "layout": layout,
            "refused": refused,
            "quantized": quantized,
            "linear": linear,
            "without data": remarks,
            "transformed": transformed,
            "moved": moved,
        }
    return {"status": "fail", "reason": refused}


def show(rows: list[dict[str, Any]]) -> None:
    runs = {r["class"] for r in rows if r["method"] == "float" and r["status"] == "pass"}
    classes = {r["class"] for r in rows}
    print(f"{len(classes)} classes, {len(runs)} run in float")
    by_method = collections.defaultdict(list)
    for row in rows:
        if row["method"] != "float" and row["class"] in runs:
            by_method[row["method"]].append(row)
    for method, found in by_method.items():
        passed = [r for r in found if r["status"] == "pass"]
        own = sum(r.get("layout") == "halfbin" for r in passed)
        sites, left = sum(r["quantized"] for r in passed), sum(r["linear"] - r["quantized"] for r in passed)
        without, still = sum(r["without data"] for r in passed), sum(not r["transformed"] for r in passed)
        notes = f"{without} sites without data" if method == "gptq" else f"{still} models in which nothing could move"
        print(
            f"{method:12} {len(passed)} of {len(found)} pass ({len(passed) / len(found):.1%}), {own} in halfbin's layout; "
            f"{sites} sites quantized, {left} linears and experts left"
            f"{'' if method == 'rtn' else '; ' + notes}"
        )
    print()
    for row in rows:
        if row["status"] != "pass":
            print(f"{row['class']:40} {row['method']:12} {row['reason'][:160]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one class")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    log = options.work / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {row["class"] for row in rows}
    for name in options.only or causal_classes():
        if name in done:
            continue
        fresh = in_child(name, options)
        rows += fresh
        with log.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in fresh)
        print(name, *(f"{r['method']}:{r['status']}" for r in fresh), file=sys.stderr, flush=True)
    show(rows)


def in_child(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One class in a process of its own, which a crash or a hang of a model's code cannot leave."""
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=send_results, args=(there, name, options.methods, options.work))
    child.start()
    there.close()
    nothing = [{"class": name, "method": "float", "status": "no float", "reason": f"more than {options.timeout:.0f} s"}]
    try:
        return here.recv() if here.poll(options.timeout) else nothing
    except EOFError:
        return [nothing[0] | {"reason": "the process ended without a result"}]
    finally:
        child.kill()
        child.join()


def send_results(there: Any, name: str, methods: list[str], work: Path) -> None:
    torch.set_num_threads(1)
    there.send(one_class(name, methods, work))


if __name__ == "__main__":
    main()
