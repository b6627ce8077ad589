"""What a set of samples is made of, token by token; no model is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.samples.cutting import Samples

RUN = 32  # tokens: long enough that two texts do not share it by chance
MULTIPLIER = 6364136223846793005  # Knuth's, of linear congruences modulo 2**64


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
    own:        the same between every other sample and the rest: what chance alone makes of one text.
    shared:     share of that text's runs of 32 tokens that a sample holds, too: what was copied.
    """

    covered: float
    divergence: float
    own: float
    shared: float


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
    return Likeness(
        covered=float(torch.isin(tokens, ours).double().mean()),
        divergence=_divergence(ours, tokens),
        own=_divergence(torch.cat(samples.ids[::2]), torch.cat(samples.ids[1::2])) if len(samples.ids) > 1 else 0.0,
        shared=_shared(samples, tokens),
    )


def _divergence(first: Tensor, second: Tensor) -> float:
    size = int(torch.maximum(first.max(), second.max())) + 1
    p, q = (torch.bincount(ids, minlength=size).double() / len(ids) for ids in (first, second))
    middle = (p + q) / 2
    nats = sum(float(torch.xlogy(d, d / middle.clamp(min=1e-300)).sum()) for d in (p, q)) / 2
    return nats / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))


def _shared(samples: Samples, tokens: Tensor) -> float:
    theirs = _runs(tokens)
    ours = torch.cat([_runs(ids) for ids in samples.ids])
    return float(torch.isin(theirs, ours).double().mean()) if len(theirs) else 0.0


def _runs(ids: Tensor) -> Tensor:
    """A number for each run of `RUN` tokens, int64: equal for equal runs, and for others by chance of 2**-64 only."""
    if len(ids) < RUN:
        return torch.zeros(0, dtype=torch.int64)
    found = torch.zeros(len(ids) - RUN + 1, dtype=torch.int64)
    for offset in range(RUN):
        found = found * MULTIPLIER + ids[offset : offset + len(found)] + 1  # wraps around
    return found
