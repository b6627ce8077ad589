"""What a set of samples is made of, token by token; no model is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.samples.cutting import Samples


@dataclass(frozen=True, slots=True)
class TokenOverview:
    """Counts over a set of samples.

    num_samples, num_tokens: of the set.
    num_repeated:  samples that are equal to an earlier one.
    vocabulary:    tokens the model knows; None where that is not known.
    num_kinds:     different tokens among the samples.
    """

    num_samples: int
    num_tokens: int
    num_repeated: int
    vocabulary: int | None
    num_kinds: int


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like another text the samples are.

    covered:    share of that text's tokens whose kind is among the samples.
    divergence: Jensen-Shannon divergence of how often each kind of token occurs, in bits: 0 the same, 1 nothing in common.
    """

    covered: float
    divergence: float


def overview(samples: Samples, vocabulary: int | None) -> TokenOverview:
    """Count."""
    distinct = {tuple(ids.tolist()) for ids in samples.ids}
    kinds = torch.unique(torch.cat(samples.ids)).numel()
    return TokenOverview(len(samples.ids), samples.num_tokens, len(samples.ids) - len(distinct), vocabulary, kinds)


def likeness(samples: Samples, tokens: Tensor) -> Likeness:
    """Compare with the tokens of a text, int64 [num_tokens], at least one.

    Source of the divergence: Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    ours = torch.cat(samples.ids)
    size = int(torch.maximum(ours.max(), tokens.max())) + 1
    p, q = (torch.bincount(ids, minlength=size).double() / len(ids) for ids in (ours, tokens))
    middle = (p + q) / 2
    divergence = sum(float(torch.xlogy(d, d / middle.clamp(min=1e-300)).sum()) for d in (p, q)) / 2
    return Likeness(float(q[p > 0].sum()), divergence / float(torch.log(torch.tensor(2.0, dtype=torch.float64))))
