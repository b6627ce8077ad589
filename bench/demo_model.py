"""Claim: the demo model has learned Python. Bits per byte on text it never saw, beside an n-gram model and xz.

    python bench/demo_model.py                        the whole table; minutes, most of them for xz
    python bench/demo_model.py --only model           the model alone
    python bench/demo_model.py --json

Bits per byte is the cost of a text in bits over its length in UTF-8 bytes. Every row is given the very same texts:

  all       every held-out file, joined by two line ends, in the order of the paths
  shipped   the held-out text that ships with halfbin: some of these files, whole
  start     the first 50,000 characters of it, which the tests check

and every row but the first xz has learned from the very same training files. The rows:

  model        the text as tokens, cut into windows of context - 1; <s> before each window; each token is scored once,
               given only the tokens before it in its own window. Weights bf16 as shipped, arithmetic float32.
  bytes ...    a model of 5-byte contexts, counts of the training files, smoothed down to uniform (see ngram.py)
  tokens ...   the same with the model's own tokens and 4 tokens of context: what the tokenizer alone explains
  xz alone     xz -9 of the text, container included
  xz primed    how much longer xz -9 of training files and text is than of the training files (its window holds both)

The baselines need the training files, which are collected from the running Python's library. A file's part is decided by its
path, so a held-out file is held out in every version; the numbers of the documentation are those of the version it names.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ngram import Smoothing, ngram_bits
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbin import demo

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "demo"))
from corpus import documents, split

ROWS = (
    "model",
    "bytes kneser-ney",
    "bytes witten-bell",
    "tokens kneser-ney",
    "tokens witten-bell",
    "xz alone",
    "xz primed",
)
START = 50_000
WINDOWS_AT_ONCE = 16


@torch.no_grad()
def model_bits(model: Any, tokens: list[int], bos: int) -> float:
    """The cost of all tokens in bits, by windows as the module's docstring says."""
    length = model.config.max_position_embeddings - 1
    windows = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    total = 0.0
    for i in range(0, len(windows), WINDOWS_AT_ONCE):
        rows = windows[i : i + WINDOWS_AT_ONCE]
        padded = torch.tensor([[bos, *row] + [bos] * (length - len(row)) for row in rows])
        targets = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
        logits = model(padded[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return total / float(np.log(2))


def model_row(texts: dict[str, str], folder: Path) -> dict[str, float]:
    """Bits of each text under the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        name: model_bits(model, tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id)
        for name, text in texts.items()
    }


def ngram_row(texts: dict[str, str], training: str, row: str, folder: Path) -> dict[str, float]:
    """Bits of each text under an n-gram model of bytes or of tokens."""
    unit, smoothing = row.split()
    kind: Smoothing = "kneser-ney" if smoothing == "kneser-ney" else "witten-bell"
    if unit == "bytes":
        symbols, width, order = as_bytes, 8, 5
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        symbols, width, order = (lambda text: as_tokens(tokenizer, text)), 12, 4
    learned = symbols(training)
    return {
        name: float(ngram_bits(learned, symbols(text), width=width, order=order, smoothing=kind).sum())
        for name, text in texts.items()
    }


def as_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes as symbols."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint64)


def as_tokens(tokenizer: Any, text: str) -> np.ndarray:
    """Tokens as symbols."""
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.uint64)


def xz_row(texts: dict[str, str], before: str) -> dict[str, float]:
    """Bits that each text adds to the xz -9 of what stands before it; an empty `before` costs nothing."""
    known = len(lzma.compress(before.encode(), preset=9)) if before else 0
    return {
        name: 8.0 * (len(lzma.compress((before + text).encode(), preset=9)) - known) for name, text in texts.items()
    }


def measure(rows: list[str], folder: Path) -> dict[str, Any]:
    """Bits per byte of every row and text."""
    parts = split(documents())
    training = "\n\n".join(document.text for document in parts["train"])
    shipped = demo.heldout_text()
    texts = {
        "all": "\n\n".join(document.text for document in parts["heldout"]),
        "shipped": shipped,
        "start": shipped[:START],
    }
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    results = {}
    for row in rows:
        if row == "model":
            bits = model_row(texts, folder)
        elif row.startswith("xz"):
            bits = xz_row(texts, training if row == "xz primed" else "")
        else:
            bits = ngram_row(texts, training, row, folder)
        results[row] = {name: round(bits[name] / sizes[name], 4) for name in texts}
    return {
        "python": platform.python_version(),
        "made_with_python": json.loads((demo.FOLDER / "made.json").read_text())["python"],
        "training_bytes": len(training.encode()),
        "bytes": sizes,
        "bits_per_byte": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=ROWS, help="a row to measure; may be repeated")
    parser.add_argument("--model", type=Path, default=demo.model_path(), help="a model directory; the shipped one")
    parser.add_argument("--json", action="store_true", help="print the numbers for programs")
    options = parser.parse_args()
    found = measure(options.only or list(ROWS), options.model)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    if found["python"] != found["made_with_python"]:
        print(
            f"The library's text is Python {found['python']}'s; the model learned {found['made_with_python']}'s, so the "
            "baselines and the column `all` differ from the documented ones."
        )
    print(f"{'bits per byte':20}" + "".join(f"{name:>10}" for name in found["bytes"]))
    print(f"{'bytes':20}" + "".join(f"{size:>10,}" for size in found["bytes"].values()))
    for row, values in found["bits_per_byte"].items():
        print(f"{row:20}" + "".join(f"{value:>10.3f}" for value in values.values()))


if __name__ == "__main__":
    main()
