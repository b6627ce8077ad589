"""How a text is cut into windows that a model reads at once, and which of their tokens are scored.

context 4, BOS, no overlap (the default)      <s> a b c | <s> d e f | <s> g          all scored, each after what precedes it
context 4, BOS, stride 1                      <s> a b c | <s> b c d | <s> c d e ...  all of the first, then the last one each
context 4, no BOS, no overlap                 a b c d | e f g                        not a, not e: nothing precedes them

Windows begin at multiples of the stride; the last one is shorter. No token is scored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbin.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Windows of one length that are read together.

    input_ids:    int64 [num_windows, length], 2 <= length <= context.
    first_scored: column of the first scored token, 1 or more; it and all after it are scored.
    first_window: index of the first row among all windows.
    """

    input_ids: Tensor
    first_scored: int
    first_window: int


@dataclass(frozen=True, slots=True)
class Definition:
    """What has to be equal before two numbers may be compared; every result of a text carries it.

    context: tokens that the model reads at once, BOS included.
    stride:  tokens from one window's begin to the next one's.
    bos:     token put before each window; None: nothing is.
    words:   the same in words, with what is scored.
    """

    context: int
    stride: int
    bos: int | None
    words: str


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """A text's tokens and how they are cut; window i is made when it is asked for. Made by `cut`.

    tokens:    int64 [num_tokens].
    context:   tokens that the model reads at once, BOS included.
    stride:    tokens from one window's begin to the next one's.
    bos:       token put before each window; None: nothing is.
    num_bytes: the text's length in bytes, None where it is not known.
    """

    tokens: Tensor
    context: int
    stride: int
    bos: int | None
    num_bytes: int | None = None

    @property
    def room(self) -> int:
        """Tokens of the text in a whole window."""
        return self.context - self._lead

    @property
    def _lead(self) -> int:
        return 0 if self.bos is None else 1

    @property
    def overlap(self) -> int:
        """Tokens that a window shares with the one before it."""
        return self.room - self.stride

    def __len__(self) -> int:
        """How many windows there are."""
        beyond_first = max(len(self.tokens) - self.room, 0)
        # Without BOS and overlap a window's first token is not scored, so one of a single token would score nothing.
        if self.bos is None and not self.overlap and beyond_first % self.stride == 1:
            beyond_first -= 1
        return 1 - (-beyond_first // self.stride)

    @property
    def num_scored(self) -> int:
        """How many tokens are scored, over all windows."""
        num_tokens = len(self.tokens)
        if self.bos is not None:
            return num_tokens
        return num_tokens - (1 if self.overlap else -(-num_tokens // self.room))

    def span(self, index: int) -> tuple[int, int, int]:
        """Window `index` as positions in the text: its begin, its first scored token, its end."""
        begin = index * self.stride
        end = min(begin + self.room, len(self.tokens))
        fresh = begin + self.overlap if index else 0
        return begin, max(fresh, begin + 1 - self._lead), end

    def input_ids(self, index: int) -> Tensor:
        """Window `index` as the model reads it, int64 [length]."""
        begin, _, end = self.span(index)
        tokens = self.tokens[begin:end]
        return tokens if self.bos is None else torch.cat([tokens.new_tensor([self.bos]), tokens])

    def batches(self, num_windows: int) -> Iterator[Batch]:
        """All windows in order, up to `num_windows` at a time; only alike ones (length, scored tokens) go together."""
        index = 0
        while index < len(self):
            alike = self._shape(index)
            end = index + 1
            while end < min(index + num_windows, len(self)) and self._shape(end) == alike:
                end += 1
            yield Batch(torch.stack([self.input_ids(i) for i in range(index, end)]), alike[1], index)
            index = end

    def _shape(self, index: int) -> tuple[int, int]:
        begin, first_scored, end = self.span(index)
        return end - begin, first_scored - begin + self._lead

    @property
    def definition(self) -> Definition:
        """How the text is cut and scored."""
        return Definition(self.context, self.stride, self.bos, self.describe())

    def describe(self) -> str:
        """The definition in words, to be printed beside every number that was measured with it."""
        before = "nothing before them" if self.bos is None else f"BOS (token {self.bos}) before each"
        if not self.overlap:
            scored = "the first token of each not scored" if self.bos is None else "every token scored once"
            return f"context {self.context}, windows of {self.room} tokens without overlap, {before}, {scored}"
        scored = "every token scored once" if self.bos is not None else "every token but the text's first scored once"
        return (
            f"context {self.context}, windows of {self.room} tokens that begin every {self.stride}, {before}; all of the "
            f"first and the last {self.stride} of each other are scored, so {scored}"
        )


def cut(
    tokens: Sequence[int] | Tensor,
    *,
    context: int,
    stride: int | None = None,
    bos: int | None,
    num_bytes: int | None = None,
) -> Windows:
    """Cut a text's tokens into windows.

    Args:
      tokens: integers [num_tokens], the text without special tokens.
      context: tokens the model reads at once, BOS included; at least 2.
      stride: tokens from one window's begin to the next one's; None: windows do not overlap.
      bos: token put before each window; None: nothing is, and a window's first token has no prediction.
      num_bytes: the text's length in bytes, for bits per byte.

    Raises:
      DataError: no token can be scored, or context and stride leave tokens out.
    """
    ids = torch.as_tensor(tokens).detach().cpu()
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise DataError(f"tokens must be integers in one dimension, got {ids.dtype} of shape {list(ids.shape)}")
    needed = 1 if bos is not None else 2
    if len(ids) < needed:
        why = "" if bos is not None else ": without BOS the first one has nothing before it that could predict it"
        raise DataError(f"the text has {len(ids)} tokens but at least {needed} must be there{why}; give a longer text")
    if context < 2:
        raise DataError(f"context={context} leaves no token to predict from another; it must be at least 2")
    room = context - (bos is not None)
    if stride is not None and not 1 <= stride <= room:
        raise DataError(f"stride={stride} must be from 1 to {room}, the tokens in a window; more would skip tokens")
    return Windows(ids.to(torch.int64), context, stride or room, bos, num_bytes)


def default_context(config: Any, *, at_most: int = 2048) -> int:
    """The context to evaluate with when none is given: what the model was made for, as far as that is stated and sane.

    Args:
      config: a Hugging Face configuration; composite ones answer for their text model.
      at_most: perplexities at longer contexts are rarely compared and cost more than they tell.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text_config, "max_position_embeddings", None)
    return min(stated, at_most) if isinstance(stated, int) and stated >= 2 else at_most
