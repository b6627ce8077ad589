"""Perplexity: exp of the mean negative log-likelihood, in nats, of the scored tokens.

    nll = -1/N * sum over scored tokens t of ln P(t | the tokens before it in its window)
    perplexity = exp(nll)              bits per byte = N * nll / (ln 2 * bytes of the text)

Which tokens are scored after which context is `Windows`' business: numbers of different windows do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbin.errors import ModelError
from halfbin.evaluation.logits import LogitSource, evaluating, position_chunks, windows_at_once
from halfbin.evaluation.windows import Batch, Definition, Windows

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text.

    value:         exp(nll); 1 is perfect, the vocabulary's size is guessing.
    nll:           mean negative log-likelihood of a scored token, nats.
    num_tokens:    how many tokens were scored.
    bits_per_byte: None unless the text's bytes are known and every token was scored; it alone compares tokenizers.
    definition:    how the text was cut and scored.
    """

    value: float
    nll: float
    num_tokens: int
    bits_per_byte: float | None = None
    definition: Definition | None = None

    @classmethod
    def of(cls, total_nll: float, windows: Windows) -> Perplexity:
        """From the summed negative log-likelihood of all scored tokens, nats."""
        nll = total_nll / windows.num_scored
        whole = windows.num_bytes and windows.num_scored == len(windows.tokens)
        bits_per_byte = total_nll / math.log(2) / windows.num_bytes if whole and windows.num_bytes else None
        # exp overflows above 709: a broken model may be that far off, and its perplexity is then beyond any number.
        value = math.exp(nll) if nll < 709 else math.inf
        return cls(value, nll, windows.num_scored, bits_per_byte, windows.definition)


def perplexity(
    model: nn.Module, windows: Windows, *, known_causal: bool = False, on_step: OnStep | None = None
) -> Perplexity:
    """Score every window.

    Args:
      model: causal; called with input_ids [batch, length], gives something with logits [batch, length, vocabulary].
      windows: the text, cut.
      known_causal: do not look whether it is: one scale for the inputs of a batch lets every token move every other a little.
      on_step: called with (windows done, windows in all) after each batch.

    Raises:
      ModelError: the model gives no logits, is not causal, or gives NaN.
      DataError: the text has tokens outside the model's vocabulary.
    """
    total = 0.0
    with evaluating(model):
        source = LogitSource(model, "the model", windows, known_causal=known_causal)
        for batch in windows.batches(windows_at_once(windows.context, source.vocabulary)):
            with source.hold(batch.input_ids) as logits:
                for begin, end in position_chunks(batch, source.vocabulary):
                    log_p = logits(begin, end).float().log_softmax(-1)
                    total += float(token_nll(log_p, batch, begin, source.role).sum(dtype=torch.float64))
            if on_step:
                on_step(batch.first_window + len(batch.input_ids), len(windows))
    return Perplexity.of(total, windows)


def token_nll(log_p: Tensor, batch: Batch, begin: int, role: str) -> Tensor:
    """Negative log-likelihood of each token that the positions from `begin` predict.

    Args:
      log_p: float32 [batch, positions, vocabulary], normalised.
      batch: where they come from.
      begin: the first position; position i predicts token i + 1.
      role: what an error calls the model.

    Returns:
      float32 [batch, positions], nats.

    Raises:
      ModelError: NaN.
    """
    targets = batch.input_ids[:, begin + 1 : begin + 1 + log_p.shape[1]].to(log_p.device)
    nll = -log_p.gather(-1, targets[..., None]).squeeze(-1)
    if torch.isnan(nll).any():
        row, column = (int(i) for i in torch.nonzero(torch.isnan(nll))[0])
        raise ModelError(
            f"{role} gives NaN for token {begin + 1 + column} of window {batch.first_window + row}: some weight or "
            "activation overflowed; try a wider type (float32 instead of float16), or keep more sites unquantized"
        )
    return nll
