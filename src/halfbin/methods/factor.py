"""What calibration data say about the columns of a weight, ready for GPTQ: an order, and a factor of the inverse.

With H = X^T X and H^-1 = U^T U, U upper triangular, rounding column j by an error e is best made up for by taking
e / U[j, j] * U[j, j:] from the columns from j on. U does not depend on the weight: layers that read the same input share it.

With H = R R^T for an upper triangular R, U = R^-1, so one factorisation (of H with both orders reversed) and one triangular
inverse do; the published code factorises, inverts and factorises again, which loses digits and takes twice the time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import SchemeError
from halfbin.kernels.threads import in_turns
from halfbin.methods.cholesky import DAMPING, Moment, solve

STRIP = 512  # columns of the inverse that are solved for at once


@dataclass(frozen=True, slots=True)
class Factor:
    """The columns of a weight in the order of rounding, and how an error in one is passed on.

    upper:   U, float32 [n, n], upper triangular, H^-1 = U^T U in the order of `order`.
    order:   int64 [n]: the columns in the order in which they are rounded.
    damping: what was added to the diagonal, as a share of its mean.
    dtype:   the type in which H was factorised.
    """

    upper: Tensor
    order: Tensor
    damping: float
    dtype: torch.dtype


def factorise(
    second_moment: Tensor | Moment, *, damping: float = DAMPING, act_order: bool = True, group_size: int | None = None
) -> Factor:
    """Factorise H for `gptq`, with the repairs of `cholesky.solve`; columns that were never active take no part.

    Args:
      second_moment: X^T X, [n, n], symmetric, any positive factor; or an observer that gives it.
      damping: added to the diagonal, as a share of its mean.
      act_order: round the columns with the largest second moment first.
      group_size: with `act_order`, keep every so many neighbouring columns together: whole groups with the largest mean come
        first, and within a group its largest columns. `gptq` needs that to choose scales again.

    Raises:
      DataError: not square, not finite, or beyond repair.
      SchemeError: a group size below 1.
    """
    diagonal = second_moment.diagonal()
    order = rounding_order(diagonal, group_size) if act_order else torch.arange(len(diagonal), device=diagonal.device)
    found = solve(second_moment, damping, order.flip(0), _lower_inverse)
    return Factor(_turned(found.value), order, found.damping, found.dtype)


def rounding_order(diagonal: Tensor, group_size: int | None = None) -> Tensor:
    """The columns with the largest second moment first, int64 [n]; ties in the order of the weight.

    Args:
      diagonal: float [n], each column's second moment.
      group_size: neighbouring columns that stay together, the last group may be shorter; None: every column for itself.
    """
    by_size = torch.argsort(diagonal, descending=True, stable=True)
    if group_size is None:
        return by_size
    if group_size < 1:
        raise SchemeError(f"group_size={group_size} must be at least 1, or None to order every column for itself")
    means = torch.stack([group.double().mean() for group in torch.split(diagonal, group_size)])
    place_of_group = torch.argsort(torch.argsort(means, descending=True, stable=True))
    return by_size[torch.argsort(place_of_group[by_size // group_size], stable=True)]


def _lower_inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, in its own memory.

    A strip of columns after the other: 0.4 of the work where no zeros are solved for. A strip needs the triangle from its own
    columns on, so its solution takes their place as soon as all strips before it are solved.
    """
    n = len(lower)
    solved: dict[int, Tensor] = {}
    written, writing = 0, threading.Lock()

    def solve_strip(start: int) -> None:
        nonlocal written
        # In columns, as LAPACK has them: from rows torch turns both ways, and solves at 88 GFLOPS instead of 101 (n = 6144).
        eye = torch.eye(min(STRIP, n - start), n - start, dtype=lower.dtype, device=lower.device).mT
        strip = torch.linalg.solve_triangular(lower[start:, start:], eye, upper=False)
        with writing:
            solved[start] = strip
            while written in solved:
                strip = solved.pop(written)
                lower[written:, written : written + strip.shape[1]] = strip
                written += STRIP

    in_turns(range(0, n, STRIP), solve_strip)
    return lower


def _turned(matrix: Tensor) -> Tensor:
    """Rows and columns in reverse order, float32 in rows, without a third matrix in between."""
    n = len(matrix)
    turned = torch.empty(n, n, device=matrix.device)
    for start in range(0, n, STRIP):
        rows = matrix[max(n - start - STRIP, 0) : n - start]
        turned[start : start + len(rows)] = rows.flip(0, 1)
    return turned
