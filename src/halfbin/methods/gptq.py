"""GPTQ: round the columns of a weight one after the other, and let those still to come make up for each error.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", https://arxiv.org/abs/2210.17323, section 3 and algorithm 1; the update is Optimal Brain Surgeon's.

With H = X^T X and H^-1 = U^T U, U upper triangular, column j is rounded, its error divided by U[j, j], and that times
U[j, j:] taken from the columns from j on. U does not depend on the weight: layers that read the same input share a `Factor`.

With H = R R^T for an upper triangular R, U = R^-1, so one factorisation (of H with both orders reversed) and one triangular
inverse do; the published code factorises, inverts and factorises again, which loses digits and takes twice the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics.ranges import RangeEstimator
from halfbin.tensor.granularity import spread
from halfbin.tensor.qtensor import QTensor, fit, require_finite
from halfbin.tensor.scheme import Scheme

BLOCK = 128  # columns whose errors are passed on at once
DAMPING = 0.01  # of the mean of H's diagonal, as published
MOST_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Factor:
    """What the calibration data say about the columns of a weight, ready for use.

    upper:   U, [n, n], upper triangular, H^-1 = U^T U in the order of `order`.
    order:   int64 [n]: the columns in the order in which they are rounded.
    damping: what was added to the diagonal, as a share of its mean.
    dtype:   the type in which H was factorised.
    """

    upper: Tensor
    order: Tensor
    damping: float
    dtype: torch.dtype


def factorise(second_moment: Tensor, *, damping: float = DAMPING, act_order: bool = True) -> Factor:
    """Factorise H for `gptq`.

    Columns that were never active get 1 on the diagonal: they take no part. Where the matrix is too far from positive definite
    for float32, float64 is tried, then ten times the damping, and so on up to the mean of the diagonal itself.

    Args:
      second_moment: X^T X, [n, n], symmetric, any positive factor.
      damping: added to the diagonal, as a share of its mean.
      act_order: round the columns with the largest second moment first.

    Raises:
      DataError: not square, not finite, or beyond repair.
    """
    n = len(second_moment)
    if second_moment.shape != (n, n) or not bool(torch.isfinite(second_moment).all()):
        raise DataError(f"a second moment must be square and finite, got {list(second_moment.shape)}")
    diagonal = second_moment.diagonal()
    mean = float(diagonal.double().mean()) if n else 1.0
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n)
    backwards = order.flip(0)
    share = damping
    while share <= MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            h = second_moment.to(dtype)[backwards][:, backwards]
            h.diagonal().add_(share * mean)
            h.diagonal()[dead[backwards]] = mean or 1.0
            lower, failed = torch.linalg.cholesky_ex(h)
            if not bool(failed):
                eye = torch.eye(n, dtype=dtype, device=h.device)
                upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
                if bool(torch.isfinite(upper).all()):
                    return Factor(upper.to(torch.float32).contiguous(), order, share, dtype)
        share = max(10 * share, 1e-4)
    raise DataError(
        f"the second moment cannot be factorised, even with {MOST_DAMPING:g} of its mean added to the diagonal"
    )


def gptq(
    weight: Tensor,
    scheme: Scheme,
    factor: Factor,
    *,
    estimator: RangeEstimator | None = None,
    params: tuple[Tensor, Tensor | None] | None = None,
    block: int = BLOCK,
) -> QTensor:
    """Choose codes that keep X @ weight^T, at scales that are fitted to the weight before the first column is rounded.

    Args:
      weight: float [out, in], finite.
      scheme: what to round to.
      factor: of the second moment [in, in] of the layer's inputs.
      estimator: chooses the range each scale covers; the whole range by default.
      params: scale and zero point to use instead of fitted ones, as `fit` and `clipped` give them.
      block: columns whose errors are passed on to the rest at once; changes time and the last bit, not the method.

    Raises:
      DataError: NaN or infinity in `weight`.
      SchemeError: shapes that do not fit.
    """
    if weight.ndim != 2 or weight.shape[1] != len(factor.order):
        raise SchemeError(f"weight {list(weight.shape)} and second moment of {len(factor.order)} features do not fit")
    require_finite(weight)
    scale, zero_point = params or fit(weight, scheme, estimator)
    shape = (weight.shape[0], weight.shape[1])
    columns = (
        weight.detach().to(torch.float32).T[factor.order].contiguous()
    )  # [in, out]: a column of the weight is a row
    codes = _Columns(scheme, shape, scale, zero_point, factor.order)
    for start in range(0, shape[1], block):
        stop = min(start + block, shape[1])
        upper = factor.upper[start:stop]
        errors = torch.empty(stop - start, shape[0], dtype=columns.dtype, device=columns.device)
        part = columns[start:stop]
        for i in range(stop - start):
            errors[i] = (part[i] - codes.round(start + i, part[i])) / upper[i, start + i]
            part[i + 1 :].addr_(upper[i, start + i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[:, stop:].T, errors, alpha=-1)
    return QTensor(
        codes.in_the_weights_order(), scale, None if zero_point is None else zero_point.to(torch.int32), scheme
    )


class _Columns:
    """Rounds one column after the other, with the scales that belong to it."""

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], scale: Tensor, zero_point: Tensor | None, order: Tensor
    ) -> None:
        self._grid, self._order = scheme.grid, order
        self._scale = _by_column(scale.to(torch.float32), shape, scheme, order)
        self._zero = None if zero_point is None else _by_column(zero_point, shape, scheme, order)
        self._codes = torch.empty(shape[1], shape[0], dtype=scheme.format.code_dtype, device=scale.device)

    def round(self, position: int, column: Tensor) -> Tensor:
        """The nearest values to a column, float32 [out]; remembers their codes."""
        scale = self._scale[position]
        zero = None if self._zero is None else self._zero[position]
        codes = self._grid.encode(column, scale, zero)
        self._codes[position] = codes
        return self._grid.decode(codes, scale, zero)

    def in_the_weights_order(self) -> Tensor:
        """All codes, [out, in]."""
        codes = torch.empty_like(self._codes)
        codes[self._order] = self._codes
        return codes.T.contiguous()


def _by_column(params: Tensor, shape: tuple[int, int], scheme: Scheme, order: Tensor) -> Tensor:
    """Scales or zero points of each column in the order of rounding: [in, out or 1]."""
    every = spread(params, shape, scheme.granularity)
    return every.expand(every.shape[0], shape[1]).T[order]
