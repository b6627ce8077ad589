"""The best of some candidates, by their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor


def search_scale(candidates: Iterable[Tensor], loss: Callable[[Tensor], float]) -> tuple[Tensor, list[float]]:
    """The candidate with the least loss, the first of equals; and all losses, in the candidates' order.

    A loss that is NaN counts as the worst. Candidates are asked for one after the other, and only the best one is kept.

    Args:
      candidates: at least one; the first should be ones, so that the search can choose to change nothing.
      loss: of a candidate.
    """
    best, losses = None, list[float]()
    for candidate in candidates:
        value = loss(candidate)
        value = math.inf if math.isnan(value) else value
        if best is None or value < min(losses):
            best = candidate
        losses.append(value)
    assert best is not None, "a search needs a candidate"
    return best, losses
