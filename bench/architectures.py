"""Claim: halfbin's calibrated methods work on whatever causal-LM class transformers has, without knowing any by its name.

    python bench/architectures.py --work FOLDER [--methods rtn gptq ... corrected] [--classes NAME ...] [--again]

A tiny random model of each class (bench/tiny_models.py) is saved and quantized with each method, in a child process with a time
limit. A run passes when the checkpoint is written, plain transformers fills its model from it, both readers give the same
logits, and, for methods that rewrite the float model first, the rewritten and unrounded model gives the original's logits.

Each run appends a line to FOLDER/results.jsonl; what is there is not run again, unless it failed and --again is given. Then a
table of shares and one of the rest with reasons are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from halfbin.models import load_as_client, load_weights
from halfbin.planning import Plan
from halfbin.run.calibration import TOKENS_AT_ONCE, Calibration, samples_for
from halfbin.run.client import settle_client
from halfbin.run.execute import Written, execute
from halfbin.run.job import Job, planned

Line = dict[str, Any]
METHODS: Mapping[str, str] = {
    "rtn": 'weights = "int4-g32"',
    "gptq": 'weights = "int4-g32"\nmethod = "gptq"',
    "awq": 'weights = "int4-g32"\ntransforms = ["awq"]',
    "smoothquant": 'weights = "int8-channel"\ntransforms = ["smoothquant"]',
    "rotate": 'weights = "int4-g32"\ntransforms = ["rotate"]',
    "corrected": 'weights = "int4-g32"\nmethod = "gptq"\ncorrection = 0.5',
}
UNTIED = {"rotate"}  # an embedding and a head turn differently, since the norm between them moves into the head
FLOAT = "float"  # the run that makes the model
SAMPLES, LENGTH = 32, 32
MEMORY_BYTES = 10 * 2**30  # addresses of one run, most of them the libraries'
CLIENT_TOLERANCE = 1e-4  # of the largest logit; both readers compute in float32
PROOF_TOLERANCE = 1e-3  # the probe allows 5e-5 of the largest output in each block, and blocks pass errors on
IDS = torch.arange(3, 19)[None]


def make(folder: Path, name: str) -> Line:
    """Save a tiny model of a class, with its logits."""
    model = tiny_models.tiny_model(*tiny_models.causal_classes()[name])
    model.save_pretrained(folder / "models" / name)
    again = type(model).from_pretrained(folder / "models" / name).eval()
    error = difference(tiny_models.run(again, IDS), tiny_models.run(model, IDS))
    if not error < CLIENT_TOLERANCE:
        raise ValueError(f"saved and loaded by transformers alone, its logits are off by {error:.1e}")
    return {"parameters": sum(p.numel() for p in model.parameters()), "type": model.config.model_type}


def quantize(folder: Path, name: str, method: str, layout: str) -> Line:
    """Quantize a saved model, and hold the result against itself and the original."""
    output = folder / "quantized" / name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    samples = Calibration(path=folder / "tokens.npy", num_samples=SAMPLES, length=LENGTH)
    job = Job(model=folder / "models" / name, recipe=folder / f"{method}.toml", layout=layout, calibration=samples)
    try:
        with planned(job) as (plan, checkpoint):
            batches = samples_for(plan.skeleton, samples).batches(TOKENS_AT_ONCE)
            written = execute(plan, checkpoint, output, batches=batches)
            settle_client(plan, output)
            original = logits(load_weights(plan.skeleton))
            found = counts(plan, written) | compared(plan, output, original)
        if "transforms" in METHODS[method]:
            found |= proof(folder, name, method, samples, original)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return found


def counts(plan: Plan, written: Written) -> Line:
    """Sites by what became of them."""
    remarks = [remark for decided in written.calibrated.values() for remark in decided.remarks]
    return {
        "quantized": sum(s.quantized for s in plan.sites),
        "left": dict(Counter(s.reason.partition(":")[0] for s in plan.sites if not s.quantized)),
        "refused": [f"{s.site.name}: {s.reason}" for s in plan.sites if "cannot hold" in s.reason][:3],
        "without_data": sum(remark.startswith("rounded without data") for remark in remarks),
        "unreached": [
            s.site.name
            for s in plan.sites
            if s.needs_data and (d := written.calibrated.get(s.site.tensor)) and d.output_error is None
        ][:5],
    }


def compared(plan: Plan, output: Path, original: Tensor) -> Line:
    """The logits of the written checkpoint, by halfbin's reader and by the client."""
    ours = logits(load_weights(plan.skeleton, directory=output))
    found = {"loss": difference(ours, original)}
    if plan.layout.name != "halfbin":
        client = load_as_client(plan.skeleton, output, dtype=torch.float32)
        found["client"] = difference(logits(client), ours)
        require(found["client"], CLIENT_TOLERANCE, "the client's logits are not those of halfbin's reader")
    return found


def proof(folder: Path, name: str, method: str, samples: Calibration, original: Tensor) -> Line:
    """The logits of the transformed model when no weight moves, since each has a scale of its own."""
    job = Job(model=folder / "models" / name, recipe=folder / f"{method}-alone.toml", calibration=samples)
    output = folder / "transformed" / name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    try:
        with planned(job) as (plan, checkpoint):
            batches = samples_for(plan.skeleton, samples).batches(TOKENS_AT_ONCE)
            written = execute(plan, checkpoint, output, batches=batches)
            error = difference(logits(load_weights(plan.skeleton, directory=output)), original)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    require(error, PROOF_TOLERANCE, "the transform alone changed the function")
    moved = sum(d.transformed for d in written.calibrated.values())
    return {"transformed": moved, "proof": error, "remarks": written.remarks}


def logits(model: nn.Module) -> Tensor:
    return tiny_models.run(model, IDS)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def require(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:
        raise ValueError(f"{what}: off by {error:.2e} of the largest logit")


def in_child(task: Callable[[], Line], limit: float) -> Line:
    """What `task` returns, or why it does not: it runs in a process of its own that shares this one's imports."""
    context = multiprocessing.get_context("fork")
    answer: SimpleQueue[Line] = context.SimpleQueue()
    child = context.Process(target=_answering, args=(task, answer))
    begin = time.monotonic()
    child.start()
    while child.is_alive() and answer.empty() and time.monotonic() - begin < limit:
        child.join(0.05)
    found = {"passed": False, "reason": f"no answer in {limit:g} s"} if child.is_alive() else {}
    if not answer.empty():
        found = answer.get()
        child.join(5)
    child.kill()
    child.join()
    died = {"passed": False, "reason": f"the process ended with {child.exitcode}"}
    return (found or died) | {"seconds": round(time.monotonic() - begin, 1)}


def _answering(task: Callable[[], Line], answer: SimpleQueue[Line]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        answer.put({"passed": True, **task()})
    except Exception as error:
        places = [
            f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-3:]
        ]
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        answer.put({"passed": False, "reason": reason[:600], "where": places})


def run_method(folder: Path, name: str, method: str, limit: float) -> Line:
    """The layout that transformers loads; where that fails, halfbin's own is tried and told beside it."""
    found = in_child(lambda: quantize(folder, name, method, "compressed-tensors"), limit)
    if not found["passed"]:
        own = in_child(lambda: quantize(folder, name, method, "halfbin"), limit)
        found["halfbin"] = own["reason"] if not own["passed"] else "passed"
    return found


def prepare(folder: Path) -> None:
    """Calibration tokens and recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCABULARY, (SAMPLES, LENGTH))
    np.save(folder / "tokens.npy", tokens.astype(np.int64))
    for method, rule in METHODS.items():
        head = "untie = true\n" * (method in UNTIED)
        (folder / f"{method}.toml").write_text(f'{head}remainder = "row"\n[[rule]]\nmatch = "*"\n{rule}\n')
        rules = "".join(
            f'[[rule]]\nmatch = "role:{role}"\nweights = "int8-g1"\ntransforms = ["{method}"]\n'
            for role in ("linear", "expert")
        )
        if "transforms" in rule:
            (folder / f"{method}-alone.toml").write_text(f'{head}layout = "halfbin"\n{rules}')


def sweep(folder: Path, names: Iterable[str], methods: Iterable[str], *, again: bool, limit: float) -> None:
    """Run what has no line yet."""
    known = last_lines(folder)
    methods = list(methods)
    for name in names:
        for method in (FLOAT, *methods):
            before = known.get((name, method))
            if before is None or (again and not before["passed"]):
                task = lambda: make(folder, name)  # noqa: B023, E731  # runs before the loop goes on
                line = in_child(task, limit) if method == FLOAT else run_method(folder, name, method, limit)
                append(folder, {"class": name, "method": method} | line)
                before = line
            if method == FLOAT and not before["passed"]:
                break


def append(folder: Path, line: Line) -> None:
    print(line["class"], line["method"], "passed" if line["passed"] else line["reason"][:150], flush=True)
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def last_lines(folder: Path) -> dict[tuple[str, str], Line]:
    """The latest line of each class and method."""
    path = folder / "results.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line["class"], line["method"]): line for line in lines}


def show(folder: Path, names: list[str], methods: Iterable[str]) -> None:
    """Shares of each method, then what did not pass."""
    lines = {key: line for key, line in last_lines(folder).items() if key[0] in names}
    models = sum(line["passed"] for (_, method), line in lines.items() if method == FLOAT)
    print(f"\n{len(names)} classes, {models} run in float\n")
    print(
        "| method | runs | passed | share | own layout only | sites | left | without data | transformed | worst client | "
        "worst proof |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for method in methods:
        print(_row(method, [line for key, line in lines.items() if key[1] == method]))
    remarks = Counter(
        f"{method}: {remark}"[:160] for (_, method), line in lines.items() for remark in line.get("remarks", ())
    )
    print("\n| classes | remark on the transform alone |\n|---:|---|")
    for remark, count in remarks.most_common():
        print(f"| {count} | {remark} |")
    print("\n| class | method | reason | in halfbin's layout |\n|---|---|---|---|")
    for (name, method), line in sorted(lines.items()):
        if not line["passed"]:
            print(f"| {name} | {method} | {line['reason'][:300]} | {line.get('halfbin', '')[:100]} |")


def _row(method: str, runs: list[Line]) -> str:
    passed = [line for line in runs if line["passed"]]
    own = sum(line.get("halfbin") == "passed" for line in runs)
    left = sum(sum(line["left"].values()) for line in passed)
    cells = [
        f"{100 * len(passed) / max(1, len(runs)):.1f} %",
        *(own, sum(line["quantized"] for line in passed), left, sum(line["without_data"] for line in passed)),
        sum(line.get("transformed", 0) > 0 for line in passed),
        *(f"{max((line.get(key, 0.0) for line in passed), default=0.0):.1e}" for key in ("client", "proof")),
    ]
    return f"| {method} | {len(runs)} | {len(passed)} | {' | '.join(map(str, cells))} |"


def main() -> None:
    """Sweep, then show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--classes", nargs="+")
    parser.add_argument("--again", action="store_true", help="run failures again")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one run")
    given = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = given.classes or list(tiny_models.causal_classes())
    prepare(given.work)
    sweep(given.work, names, given.methods, again=given.again, limit=given.limit)
    show(given.work, names, given.methods)


if __name__ == "__main__":
    main()
