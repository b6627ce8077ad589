"""Cholesky factors of second moments, which are singular as often as not, with repairs that are defined and told.

A channel that was never active has a row of zeros; fewer tokens than channels leave the matrix without full rank; squares of
very different sizes are more than float32 can hold apart. Damping mends all three: a share of the mean diagonal is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfbin.errors import DataError

DAMPING = 0.01  # of the mean of the diagonal, as GPTQ's authors published
MOST_DAMPING = 1.0


class Moment(Protocol):
    """A second moment that is not held whole, as an observer sums it."""

    def diagonal(self) -> Tensor:
        """float64 [n]."""
        ...

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[n, n], symmetric to the bit, in memory of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Solved:
    """What was asked of a factor, and what it took.

    value:   finite, of type `dtype`.
    damping: what was added to the diagonal, as a share of its mean.
    dtype:   the type in which the matrix was factorised.
    """

    value: Tensor
    damping: float
    dtype: torch.dtype


def solve(second_moment: Tensor | Moment, damping: float, order: Tensor, ask: Callable[[Tensor], Tensor]) -> Solved:
    """Factorise L L^T = H, rows and columns in `order`, and give `ask(L)`.

    Columns that were never active get the mean on the diagonal: they take no part. Where the matrix is too far from positive
    definite for float32, float64 is tried, then ten times the damping, and so on up to the mean of the diagonal itself.

    Memory beside H: two matrices of n * n in the type of the factorisation.

    Args:
      second_moment: H, [n, n], symmetric, finite, any positive factor; or what gives it.
      damping: added to the diagonal, as a share of its mean.
      order: int64 [n].
      ask: from the lower triangle, float32 or float64 [n, n], which it may overwrite, to any tensor; what is not finite
        counts as a failure.

    Raises:
      DataError: not square, not finite, or beyond repair.
    """
    if isinstance(second_moment, Tensor) and len(set(second_moment.shape)) > 1:
        raise DataError(f"a second moment must be square and finite, got {list(second_moment.shape)}")
    diagonal = second_moment.diagonal()
    n = len(diagonal)
    # That of an observer is a sum of squares: all of it is at most as large as its diagonal.
    whole = second_moment if isinstance(second_moment, Tensor) else diagonal
    if not bool(torch.isfinite(whole.sum())):
        raise DataError(f"a second moment must be square and finite, and this one of {n} features is not finite")
    mean = float(diagonal.double().mean()) if n else 1.0
    dead = (diagonal <= 0)[order]
    share = damping
    while share <= MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            h = _ordered(second_moment, dtype, order)
            h.diagonal().add_(share * mean)
            h.diagonal()[dead] = mean or 1.0
            # A symmetric matrix is its own transpose, and LAPACK's columns are torch's rows: so it works in place.
            lower, failed = torch.linalg.cholesky_ex(
                h.mT, out=(h.mT, torch.empty((), dtype=torch.int32, device=h.device))
            )
            del h
            if not bool(failed):
                value = ask(lower)
                if bool(torch.isfinite(value.sum())):
                    return Solved(value, share, dtype)
        share = max(10 * share, 1e-4)
    raise DataError(
        f"the second moment cannot be factorised, even with {MOST_DAMPING:g} of its mean added to the diagonal"
    )


def _ordered(second_moment: Tensor | Moment, dtype: torch.dtype, order: Tensor) -> Tensor:
    """H in a type, rows and columns in `order`, in memory of its own; at no time are there more than two of it."""
    h = second_moment.to(dtype) if isinstance(second_moment, Tensor) else second_moment.matrix(dtype)
    h = h[order]
    return h[:, order]
