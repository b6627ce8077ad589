"""Tokens to samples: packed without waste for models that read on and on, one by one for those that read sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a model reads while it is calibrated.

    ids:  one int64 [length] a sample, special tokens included.
    name: what they came from.
    how:  how they were cut, in words.
    """

    ids: tuple[Tensor, ...]
    name: str
    how: str

    @property
    def num_tokens(self) -> int:
        """All samples together."""
        return sum(map(len, self.ids))

    def batches(self, tokens_at_once: int) -> list[Tensor]:
        """Samples of one length together, int64 [num_samples, length], the longest first; up to so many tokens at a time.

        The order depends on nothing but the samples.
        """
        found = []
        for length in sorted({len(ids) for ids in self.ids}, reverse=True):
            alike = [ids for ids in self.ids if len(ids) == length]
            step = max(1, tokens_at_once // length)
            found += [torch.stack(alike[i : i + step]) for i in range(0, len(alike), step)]
        return found


def pack(
    documents: Sequence[Tensor],
    *,
    num_samples: int,
    length: int,
    seed: int,
    bos: int | None,
    eos: int | None,
    name: str,
) -> Samples:
    """Join documents and cut them into samples of exactly `length` tokens; no token is padding.

    Args:
      documents: int64 [num_tokens] each; a `bos` that they begin with is taken off.
      num_samples: how many to choose, without putting back; all where there are fewer.
      length: of each, `bos` included.
      seed: of the choice.
      bos: put before each sample, as in evaluation.
      eos: put between documents.
      name: what they came from.

    Raises:
      DataError: there is no token.
    """
    documents = [d[1:] if bos is not None and len(d) and int(d[0]) == bos else d for d in documents]
    parts = [part for i, d in enumerate(documents) for part in ([_one(eos)] if i and eos is not None else []) + [d]]
    stream = torch.cat(parts).to(torch.int64) if parts else torch.zeros(0, dtype=torch.int64)
    if not len(stream):
        raise DataError(f"{name} gives no tokens to calibrate on; give a text")
    room = max(1, length - (bos is not None))
    num = len(stream) // room
    if not num:  # shorter than one sample: it is one, as it is
        cut, num = stream[None], 1
    else:
        cut = stream[: num * room].reshape(num, room)
    chosen = spread(num, num_samples, seed)
    lead = [] if bos is None else [_one(bos)]
    ids = tuple(torch.cat([*lead, cut[i]]) for i in chosen)
    how = f"{len(ids)} of {num} samples of {len(ids[0])} tokens, packed, seed {seed}"
    return Samples(ids, name, how)


def separate(
    documents: Iterator[Tensor] | Sequence[Tensor], *, num_samples: int, length: int, seed: int, name: str
) -> Samples:
    """Documents as samples of their own, cut after `length` tokens.

    Raises:
      DataError: there is no token.
    """
    all_ids = [d[:length].to(torch.int64) for d in documents if len(d)]
    if not all_ids:
        raise DataError(f"{name} gives no tokens to calibrate on; give a text")
    ids = tuple(all_ids[i] for i in spread(len(all_ids), num_samples, seed))
    return Samples(ids, name, f"{len(ids)} of {len(all_ids)} texts, each cut after {length} tokens, seed {seed}")


def spread(num: int, wanted: int, seed: int) -> list[int]:
    """Which of `num` things in a row are taken: one at random out of each of `wanted` stretches of one length; rising."""
    if num <= wanted:
        return list(range(num))
    edges = torch.arange(wanted + 1) * num // wanted
    inside = torch.rand(wanted, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (edges[:-1] + (inside * edges.diff()).long()).tolist()


def _one(token: int) -> Tensor:
    return torch.tensor([token], dtype=torch.int64)
