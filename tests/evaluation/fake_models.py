"""Small causal models whose logits can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Bigram(nn.Module):
    """logits[t] = table[token t]: what follows depends on one token only."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def random_bigram(vocabulary: int, seed: int, spread: float = 2.0) -> Bigram:
    return Bigram(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread)


def tiny_llama(vocabulary: int = 50, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
