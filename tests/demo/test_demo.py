"""The embedded model is what its README says, and it has learned something."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbin import demo

WEIGHTS = demo.model_path() / "model.safetensors"
MB = 1_000_000

# From `python bench/demo_model.py`, column `start`: what the better of the two smoothings of an order-5 model of bytes,
# trained on the same files, needs for the very text that is scored below.
START = 50_000
BYTE_NGRAM_BITS = 1.4819


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32).eval()


@torch.no_grad()
def bits_per_byte(text: str) -> float:
    """Windows of 511 tokens after <s>, each token scored once; one window at a time."""
    ids = tokenizer().encode(text, add_special_tokens=False)
    nats = 0.0
    for i in range(0, len(ids), 511):
        row = torch.tensor([0, *ids[i : i + 511]])
        logits = model()(row[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def significant_lines(text: str) -> set[str]:
    """Lines that hardly come about twice by chance: 60 characters or more, with words in them."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 60 and any(map(str.isalpha, line))}


def test_the_model_is_a_llama_whose_widths_take_groups_of_128() -> None:
    config = json.loads((demo.model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    key_value = config["num_key_value_heads"] * config["head_dim"]
    assert [config["hidden_size"] % 128, config["intermediate_size"] % 128, key_value % 128] == [0, 0, 0]


def test_the_weights_are_2_to_6_million_bf16_numbers_below_12_mb() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert 2e6 < parameters < 6e6
    assert parameters == json.loads((demo.FOLDER / "made.json").read_text())["parameters"]
    assert WEIGHTS.stat().st_size < 12 * MB


def test_everything_that_ships_is_below_14_mb() -> None:
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 14 * MB


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r<s>/😀é'"))))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(ids) == text


@pytest.mark.parametrize("text", [demo.calibration_text(), demo.heldout_text()], ids=["calibration", "heldout"])
def test_the_shipped_texts_survive_the_tokenizer_at_over_3_bytes_a_token(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(ids) == text
    # Bytes would be 1.0 and words of this source about 4: a vocabulary learned from other text falls below.
    assert len(text.encode()) / len(ids) > 3.0
    assert max(ids) < model().config.vocab_size


def test_special_tokens_are_those_of_the_config() -> None:
    config, special = model().config, tokenizer()
    assert (special.bos_token, special.bos_token_id) == ("<s>", config.bos_token_id)
    assert (special.eos_token, special.eos_token_id) == ("</s>", config.eos_token_id)
    assert (special.pad_token, special.pad_token_id) == ("<pad>", config.pad_token_id)


def test_held_out_text_costs_clearly_less_than_under_an_ngram_model() -> None:
    bits = bits_per_byte(demo.heldout_text()[:START])
    assert bits < 0.9 * BYTE_NGRAM_BITS
    # Far below what models of any size reach on source they have not seen: it would have been trained on this text.
    assert bits > 0.4


def test_it_predicts_python_and_not_just_anything() -> None:
    text = demo.heldout_text()[:6_000]
    reversed_lines = "\n".join(line[::-1] for line in text.splitlines())
    assert bits_per_byte(text) < 0.5 * bits_per_byte(reversed_lines)


def test_calibration_and_held_out_texts_share_no_long_line() -> None:
    assert significant_lines(demo.calibration_text()) & significant_lines(demo.heldout_text()) == set()


def test_calibration_and_held_out_texts_are_of_useful_size() -> None:
    assert 400_000 < len(demo.calibration_text().encode()) < 600_000
    assert 250_000 < len(demo.heldout_text().encode()) < 400_000


def test_greedy_generation_repeats_itself_exactly() -> None:
    start = tokenizer()("def test_", return_tensors="pt")
    first, second = (model().generate(**start, max_new_tokens=16, do_sample=False) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert first.shape[1] > start["input_ids"].shape[1]
