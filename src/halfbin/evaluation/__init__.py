"""What quantization cost, in numbers that have one stated definition each; `docs/evaluation.md` gives them from the start."""

from __future__ import annotations

from halfbin.evaluation.compare import Comparison, Spread, WindowMeans, compare
from halfbin.evaluation.embeddings import EmbeddingComparison, compare_embeddings, embed, similarity, spearman
from halfbin.evaluation.layers import TensorError, output_errors, weight_error
from halfbin.evaluation.paired import Interval, paired_difference
from halfbin.evaluation.perplexity import Perplexity, perplexity
from halfbin.evaluation.text import Tokens, tokenize
from halfbin.evaluation.windows import Batch, Definition, Windows, cut, default_context

__all__ = [
    "Batch",
    "Comparison",
    "Definition",
    "EmbeddingComparison",
    "Interval",
    "Perplexity",
    "Spread",
    "TensorError",
    "Tokens",
    "WindowMeans",
    "Windows",
    "compare",
    "compare_embeddings",
    "cut",
    "default_context",
    "embed",
    "output_errors",
    "paired_difference",
    "perplexity",
    "similarity",
    "spearman",
    "tokenize",
    "weight_error",
]
