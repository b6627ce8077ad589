"""How far an encoder's sentence embeddings moved, and whether they still order sentences as people do.

embedding   mean of the last hidden state over a sentence's real tokens, divided by its length (L2)
cosine      mean over sentences of the cosine between a sentence's two embeddings
squared     mean over sentences and coordinates of the squared difference; with unit vectors of size d, 2 (1 - cosine) / d
Spearman    correlation of ranks between the cosine of a pair's embeddings and its human score; ties share their mean rank

The correlation alone is too weak a check: rounding can raise it. The squared error cannot be raised by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from halfbin.errors import DataError, ModelError
from halfbin.evaluation.logits import evaluating
from halfbin.evaluation.perplexity import OnStep
from halfbin.evaluation.text import Tokenizer


@dataclass(frozen=True, slots=True)
class EmbeddingComparison:
    """Two encoders' embeddings of the same sentences: mean cosine, and mean squared error of a coordinate."""

    mean_cosine: float
    mean_squared_error: float
    num_sentences: int


def embed(
    model: nn.Module,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    max_tokens: int = 128,
    batch_size: int = 64,
    on_step: OnStep | None = None,
) -> Tensor:
    """One unit vector for each sentence.

    Args:
      model: an encoder; gives something with last_hidden_state [batch, length, dim].
      tokenizer: the model's own, with a padding token; special tokens are added.
      sentences: at least one.
      max_tokens: longer sentences are cut there.
      batch_size: sentences read together; those of similar length are.
      on_step: called with (sentences done, sentences in all) after each batch.

    Returns:
      float32 [num_sentences, dim], each row of length 1.

    Raises:
      DataError: no sentences.
      ModelError: the model gives no hidden state, or NaN.
    """
    if not sentences:
        raise DataError("there are no sentences to embed; give at least one")
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            part = [sentences[i] for i in order[begin : begin + batch_size]]
            fed = tokenizer(part, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            rows.append(_pool(model, {key: value.to(device) for key, value in fed.items()}))
            if on_step:
                on_step(begin + len(part), len(order))
    sorted_rows = torch.cat(rows)
    result = torch.empty_like(sorted_rows)
    result[torch.tensor(order)] = sorted_rows
    return result


def _pool(model: nn.Module, fed: Mapping[str, Any]) -> Tensor:
    state = getattr(model(**fed), "last_hidden_state", None)
    if not isinstance(state, Tensor):
        raise ModelError(
            f"{type(model).__name__} gives no last_hidden_state; embeddings need an encoder without a head"
        )
    mask = fed["attention_mask"][..., None].float()
    mean = (state.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
    if torch.isnan(mean).any():
        raise ModelError(
            f"{type(model).__name__} gives NaN in a sentence's embedding; try a wider type, such as float32"
        )
    return functional.normalize(mean, dim=1).cpu()


def compare_embeddings(before: Tensor, after: Tensor) -> EmbeddingComparison:
    """Compare unit vectors, float [num_sentences, dim], of two encoders for the same sentences.

    Raises:
      DataError: the shapes differ.
    """
    if before.shape != after.shape:
        raise DataError(f"embeddings of shapes {list(before.shape)} and {list(after.shape)} cannot be compared")
    before, after = before.double(), after.double()
    return EmbeddingComparison(
        mean_cosine=float((before * after).sum(1).mean()),
        mean_squared_error=float((before - after).square().mean()),
        num_sentences=len(before),
    )


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each pair of unit vectors: float [num_pairs, dim] twice to float64 [num_pairs]."""
    return (first.double() * second.double()).sum(1)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two sequences of numbers; equal numbers share the mean of their ranks.

    Source: Spearman 1904; Kendall 1970, Rank Correlation Methods, chapter 3 (ties).

    Raises:
      DataError: lengths differ, fewer than two numbers, or one side is constant and has no order.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise DataError(f"a rank correlation needs two sequences of one length, 2 or more; got {x.shape} and {y.shape}")
    if np.isnan(x).any() or np.isnan(y).any() or x.min() == x.max() or y.min() == y.max():
        raise DataError("a sequence that is constant or holds NaN has no ranks to correlate")
    return float(np.corrcoef(mean_ranks(x), mean_ranks(y))[0, 1])


def mean_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each number, from 1; equal numbers share the mean of their ranks. Float64 [n] to float64 [n]."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[which]
    return means
