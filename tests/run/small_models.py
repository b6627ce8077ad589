"""A small Llama with a tokenizer of letters, so that a run can be measured: logits that differ, a text of few tokens."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

LETTERS = string.ascii_lowercase + " \n.,()[]:=_#'\"012"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = len(SPECIAL) + len(LETTERS)
TEXT = "def add(one, two):\n    return one, two  # both of them\n" * 12


def write_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """A tokenizer with one token a letter, its id at least 4; what it does not know is <unk>."""
    words = {word: i for i, word in enumerate([*SPECIAL, *LETTERS])}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **names).save_pretrained(folder)


def write_model(folder: Path, *, dtype: torch.dtype = torch.float32, bos: bool = True, **changes: Any) -> Path:
    """The model's directory: hidden 64, two layers, weights large enough that its predictions are far from uniform."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    config = transformers.LlamaConfig(**sizes | changes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder, bos=bos)
    return folder
