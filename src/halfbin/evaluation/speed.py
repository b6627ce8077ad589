"""How fast a causal model runs: prefill, the first token, decoding.

One definition each. *Prefill*: the prompt is read at once with an empty cache, and logits of the last token are asked for; its
rate is prompt tokens over the median time. *First token*: the same time: from the prompt to the choice of the first token.
*Decode*: one token after the other, each the most likely one, with the cache that the model keeps; a rate is one over the
median time of a step. The batch is one sequence. Times of the first, unmeasured round are thrown away: kernels are chosen and
weights are packed in it.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.errors import ModelError

OnStep = Callable[[int, int], None]
CACHES = ("cache", "past_key_values", "cache_params")  # what a model calls it, as an argument and in its output


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the same work, done again and again."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Of one or more measurements."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured.

    prompt_tokens: read at once.
    new_tokens:    decoded in each round.
    rounds:        measured.
    prefill:       of the whole prompt.
    step:          of one decoded token.
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    prefill: Times
    step: Times

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """New tokens a second."""
        return 1 / self.step.median


def measure_speed(
    model: nn.Module, prompt: Tensor, *, new_tokens: int, rounds: int, on_step: OnStep | None = None
) -> Speed:
    """Time a causal model.

    Args:
      model: in evaluation mode; its forward takes input_ids, use_cache and a cache, as transformers' models do.
      prompt: token ids, int64 [1, prompt_tokens].
      new_tokens: how many to decode after it, at least 1.
      rounds: measured ones, at least 1; one more goes before.
      on_step: called with (rounds done, rounds in all).

    Raises:
      ModelError: the model keeps no cache, so that decoding would read the whole text for each token.
    """
    prefills: list[float] = []
    steps: list[float] = []
    for done in range(rounds + 1):
        first, rest = _round(model, prompt, new_tokens)
        if done:
            prefills.append(first)
            steps += rest
        if on_step:
            on_step(done + 1, rounds + 1)
    return Speed(prompt.shape[1], new_tokens, rounds, Times.of(prefills), Times.of(steps))


@torch.inference_mode()
def _round(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds of the prompt, and of each token after it."""
    parameters = inspect.signature(model.forward).parameters
    name = next((n for n in CACHES if n in parameters), CACHES[1])
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    begin = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, **only_last)
    token = output.logits[:, -1:].argmax(-1)
    prefill = time.perf_counter() - begin
    cache = next((found for n in CACHES if (found := getattr(output, n, None)) is not None), None)
    if cache is None:
        raise ModelError(
            f"{type(model).__name__} keeps no keys and values from one token to the next, so decoding would read the whole "
            "text again for each token; its speed is not measured"
        )
    steps = []
    for _ in range(new_tokens):
        begin = time.perf_counter()
        output = model(input_ids=token, use_cache=True, **{name: cache})
        token = output.logits[:, -1:].argmax(-1)
        steps.append(time.perf_counter() - begin)
    return prefill, steps
