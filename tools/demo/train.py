"""Train the demo model: a small Llama on the source of the Python standard library.

    python tools/demo/train.py --work build/demo --minutes 45      train; run again to go on after an interruption
    python tools/demo/train.py --work build/demo --tokens 8000000  the same, ending after so many tokens
    python tools/demo/train.py --work build/demo --export src/halfbin/demo

Two cores and bf16 are enough. Matrices inside the blocks learn with Muon (https://kellerjordan.github.io/posts/muon/),
embeddings and norms with AdamW; the rate warms up, stays, and falls to zero over the last 40 % of the time or tokens.
A budget in minutes ends when you said; on a busy machine it ends with fewer tokens seen, and only a budget in tokens can be
repeated with the same result.

The script starts itself again with glibc told to keep freed memory: a training step frees and takes the same large blocks
over and over, and giving them back to the kernel in between cost two thirds of the time (1,100 against 3,800 tokens/s).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import documents, excerpt, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512
SEED = 20261123
MUON_RATE = 0.02
ADAM_RATE = 0.003


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE: every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of tokens, <s> before each."""
    pieces = [[0, *encoding.ids] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.fromiter((token for piece in pieces for token in piece), dtype=np.uint16)


def model_config() -> LlamaConfig:
    """5.8 million parameters; every width a multiple of 128, so that groups of 128 fit."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimizer with its highest rate."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(inside, lr=MUON_RATE, momentum=0.95, weight_decay=0.0)
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, MUON_RATE), (adam, ADAM_RATE)]


def rate(progress: float) -> float:
    """Share of the highest rate at a share of the tokens: warm-up over 2 %, fall to zero over the last 40 %."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.4) if progress < 1.0 else 0.0


def window(stream: np.ndarray, rng: np.random.Generator, batch: int) -> torch.Tensor:
    """Random windows of CONTEXT tokens and one more to predict: int64 [batch, CONTEXT + 1]."""
    starts = rng.integers(0, len(stream) - CONTEXT - 1, size=batch)
    rows = np.stack([stream[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
    rows[:, 0] = 0  # <s> opens every window, as it does in evaluation
    return torch.from_numpy(rows)


def train(work: Path, stream: np.ndarray, *, minutes: float, num_tokens: int | None, batch: int) -> None:
    """Train until the tokens, or else the minutes, are used up; the schedule follows them, so the end is at rate zero."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(model_config())
    steps = optimizers(model)
    rng = np.random.default_rng(SEED)
    state: dict[str, Any] = {"tokens": 0, "seconds": 0.0}
    saved = work / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        for (optimizer, _), held in zip(steps, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        rng = np.random.default_rng(SEED + state["tokens"])
    tokens, before = int(state["tokens"]), float(state["seconds"])
    started = last = time.monotonic()
    losses: list[float] = []
    model.train()
    while True:
        spent = before + time.monotonic() - started
        progress = tokens / num_tokens if num_tokens else spent / (minutes * 60)
        if progress >= 1.0:
            break
        factor = rate(progress)
        for optimizer, highest in steps:
            for group in optimizer.param_groups:
                group["lr"] = highest * factor
        rows = window(stream, rng, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(rows[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in steps:
            optimizer.step()
            optimizer.zero_grad()
        tokens += batch * CONTEXT
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            speed = 50 * batch * CONTEXT / (time.monotonic() - last)
            last = time.monotonic()
            print(
                f"{spent / 60:6.1f} min  {tokens:>10,} tokens  loss {np.mean(losses[-50:]):.4f}  {speed:,.0f} tokens/s"
            )
        if len(losses) % 500 == 0:
            save(saved, model, steps, tokens, spent)
    save(saved, model, steps, tokens, spent)


def save(path: Path, model: LlamaForCausalLM, steps: list[Any], tokens: int, seconds: float) -> None:
    """Keep everything that going on needs, replacing the earlier state in one step."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer, _ in steps],
        "tokens": tokens,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def export(work: Path, target: Path, parts: dict[str, Any]) -> None:
    """Write the model directory and the two texts that ship with it."""
    state = torch.load(work / "state.pt", weights_only=True)
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(target / "model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target / "model")
    config = target / "model" / "tokenizer_config.json"
    # transformers 5 writes its own new class name; this older one is understood by every version.
    config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for path in (target / "model").iterdir():
        path.chmod(0o644)  # safetensors makes its files private
    (target / "calibration.txt").write_text(excerpt(parts["calibration"], 500_000), encoding="utf-8")
    (target / "heldout.txt").write_text(excerpt(parts["heldout"], 300_000), encoding="utf-8")
    made = {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "tokens_seen": state["tokens"],
        "minutes": round(state["seconds"] / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (target / "made.json").write_text(json.dumps(made, indent=2) + "\n")


def main() -> None:
    """Parse the command line; train, or export what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer, the tokens and the state")
    parser.add_argument("--minutes", type=float, default=45.0, help="how long to train, earlier runs counted in; 45")
    parser.add_argument("--tokens", type=int, help="how many tokens to train on, instead of --minutes")
    parser.add_argument("--batch", type=int, default=8, help="windows a step; 8")
    parser.add_argument("--export", type=Path, help="write the shipped files into this folder and stop")
    options = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_MAX_") is None:
        os.environ.update({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)})
        os.execv(sys.executable, [sys.executable, *sys.argv])
    options.work.mkdir(parents=True, exist_ok=True)
    random.seed(SEED)
    parts = split(documents())
    if options.export:
        export(options.work, options.export, parts)
        return
    texts = [document.text for document in parts["train"]]
    if not (options.work / "tokenizer.json").exists():
        train_tokenizer(texts, options.work / "tokenizer.json")
    stream = encode(Tokenizer.from_file(str(options.work / "tokenizer.json")), texts)
    sizes = {name: sum(len(d.text.encode()) for d in found) for name, found in parts.items()}
    print(f"bytes {sizes}, {len(stream):,} training tokens, uniform loss {math.log(VOCABULARY):.3f}")
    train(options.work, stream, minutes=options.minutes, num_tokens=options.tokens, batch=options.batch)


if __name__ == "__main__":
    main()
