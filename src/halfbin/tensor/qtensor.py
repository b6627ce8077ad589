"""`QTensor`: codes and how to read them. `quantize` makes one from real numbers, `dequantize` gives real numbers back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbin.errors import DataError, SchemeError
from halfbin.numerics.formats import IntegerFormat, working
from halfbin.numerics.ranges import MeanSquaredError, MinMax, RangeEstimator
from halfbin.tensor.granularity import regions, scale_shape, spread
from halfbin.tensor.rowwise import Rowwise, rowwise
from halfbin.tensor.scheme import Scheme

if TYPE_CHECKING:
    from halfbin.tensor.mixed import MixedTensor


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """Codes and how to read them: x_hat = scale * (value(codes) - zero_point), tile by tile.

    codes:      scheme.format.code_dtype [*shape]: integers, or bit patterns of floats, or table indices, one an element.
    scale:      scheme.scale_format.dtype [*scale_shape(shape, granularity)], finite and > 0, also for zeros.
    zero_point: int32, shaped like scale, qmin <= zero_point <= qmax; None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        expected = scale_shape(tuple(self.codes.shape), self.scheme.granularity)
        if tuple(self.scale.shape) != expected:
            raise SchemeError(
                f"scale has shape {list(self.scale.shape)}, but {self.scheme} on codes {list(self.codes.shape)} "
                f"needs {list(expected)}"
            )
        if self.codes.dtype != self.scheme.format.code_dtype or self.scale.dtype != self.scheme.scale_format.dtype:
            raise SchemeError(
                f"{self.scheme} holds {self.scheme.format.code_dtype} codes and {self.scheme.scale_format.dtype} "
                f"scales, got {self.codes.dtype} and {self.scale.dtype}"
            )
        if (self.zero_point is None) != self.scheme.symmetric:
            raise SchemeError(f"{self.scheme}: a zero point must be there exactly when the scheme is asymmetric")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise SchemeError(f"zero_point {list(self.zero_point.shape)} and scale {list(expected)} differ in shape")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the codes stand for."""
        return tuple(self.codes.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of elements."""
        return self.scheme.bits_per_weight(self.shape)

    def to(self, device: torch.device | str) -> QTensor:
        """The same codes and scales on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QTensor(self.codes.to(device), self.scale.to(device), zero_point, self.scheme)

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows start <= i < stop of the first dimension, sharing memory.

        Raises:
          SchemeError: they begin inside a tile that does not reach over all rows.
        """
        height = self.scheme.granularity.tile(self.shape)[0]
        if height < len(self.codes) and start % height:
            raise SchemeError(f"rows from {start} on begin inside a tile of {height} rows of {self.scheme}")
        tiles = slice(start // height, -(-stop // height)) if height < len(self.codes) else slice(None)
        zero_point = None if self.zero_point is None else self.zero_point[tiles]
        return QTensor(self.codes[start:stop], self.scale[tiles], zero_point, self.scheme)


def fit(x: Tensor, scheme: Scheme, estimator: RangeEstimator | None = None) -> tuple[Tensor, Tensor | None]:
    """The scale, as stored, and the zero point of every tile of `x`.

    Args:
      x: float, any shape the scheme's granularity accepts; must be finite.
      scheme: what `x` will be rounded to.
      estimator: chooses the range each scale covers; the whole range by default.

    Returns:
      scale and zero_point (None when symmetric), as `QTensor` holds them.
    """
    tracked = torch.is_grad_enabled() and x.requires_grad  # the fast loop has no gradient
    if isinstance(estimator, MeanSquaredError) and not tracked:
        rows = rowwise(x, scheme)
        if not isinstance(rows, str) and (found := rows.search(estimator)):
            return scheme.grid.params(*found)
    return fit_plainly(x, scheme, estimator)


def fit_plainly(x: Tensor, scheme: Scheme, estimator: RangeEstimator | None = None) -> tuple[Tensor, Tensor | None]:
    """`fit` step by step: slow, for every tensor and estimator, and what the fast path is held against."""
    estimator = estimator or MinMax()
    shape = scale_shape(tuple(x.shape), scheme.granularity)
    minimum = torch.zeros(shape, dtype=working(x[:0] if x.ndim else x).dtype, device=x.device)
    maximum = torch.zeros_like(minimum)
    for region in regions(tuple(x.shape), scheme.granularity):
        low, high = estimator(region.rows(x), scheme.grid)
        minimum[region.tiles] = low.reshape(minimum[region.tiles].shape)
        maximum[region.tiles] = high.reshape(maximum[region.tiles].shape)
    return scheme.grid.params(minimum, maximum)


def quantize(
    x: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    estimator: RangeEstimator | None = None,
) -> QTensor:
    """Round every element to the nearest value of the scheme; ties go to the even code.

    Promise: inside the range no element moves by more than half the gap to its neighbouring values (scale / 2 for
    integers), 0.0 is exact, and what lies beyond the range is clipped to its end.

    Args:
      x: float16, bfloat16, float32 or float64, any shape that the granularity accepts; must be finite.
      scheme: what to round to.
      scale: positive scales to use instead of fitted ones, shaped as `QTensor.scale`; rounded to how they are stored.
      zero_point: integer codes that belong to `scale`, shaped like it; needed when the scheme is asymmetric.
      estimator: chooses the range each scale covers when `scale` is not given; the whole range by default.

    Raises:
      DataError: NaN or infinity in `x`, or a scale that is not positive and finite, with the first position.
      SchemeError: the scheme does not fit the shape, a scale came without its zero point, or a zero point is no code.
    """
    rows = rowwise(x, scheme)
    if isinstance(rows, str):
        return _quantize(x, scheme, scale, zero_point, estimator, None)
    given = scale is not None or zero_point is not None or not isinstance(estimator, MinMax | None)
    tracked = torch.is_grad_enabled() and x.requires_grad  # the fast loop has no gradient for the scales
    if not given and not tracked and (found := rows.quantize()):
        return QTensor(*found, scheme)
    return _quantize(x, scheme, scale, zero_point, estimator, rows)


def quantize_plainly(
    x: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    estimator: RangeEstimator | None = None,
) -> QTensor:
    """`quantize` step by step over the whole tensor: slow, for every scheme, and what the fast path is held against."""
    return _quantize(x, scheme, scale, zero_point, estimator, None)


def _quantize(
    x: Tensor,
    scheme: Scheme,
    scale: Tensor | None,
    zero_point: Tensor | None,
    estimator: RangeEstimator | None,
    rows: Rowwise | None,
) -> QTensor:
    """Step by step, with `rows`, which is `x`, for a fast last step, or None."""
    if scale is None:
        if zero_point is not None:
            raise SchemeError("a zero_point was given without the scale it belongs to; pass both or neither")
        require_finite(x)
        scale, zero_point = fit(x, scheme, estimator) if rows else fit_plainly(x, scheme, estimator)
    else:
        require_finite(x)
        _check_given(scale, zero_point, x, scheme)
        if scale.dtype != scheme.scale_format.dtype:
            scale = scheme.scale_format.round(working(scale))
    codes = rows.encode(scale, zero_point) if rows else _encode(x, scheme, scale, zero_point)
    return QTensor(codes, scale, None if zero_point is None else zero_point.to(torch.int32), scheme)


def _check_given(scale: Tensor, zero_point: Tensor | None, x: Tensor, scheme: Scheme) -> None:
    """Refuse what no caller can mean: rounding with it would give codes without complaint, and the wrong ones."""
    expected = scale_shape(tuple(x.shape), scheme.granularity)
    for name, params in (("scale", scale), ("zero_point", zero_point)):
        if params is not None and tuple(params.shape) != expected:
            raise SchemeError(
                f"{name} has shape {list(params.shape)}, but {scheme} on {list(x.shape)} needs {list(expected)}"
            )
    numbers = scale.to(torch.float64)
    bad = ~((numbers > 0) & (numbers < torch.inf))
    if bool(bad.any()):
        first = tuple(int(i) for i in torch.nonzero(bad)[0])
        raise DataError(
            f"{int(bad.sum())} of {scale.numel()} scales are not positive and finite, the first is "
            f"{numbers[first].item()} at {list(first)}; a scale that is learned needs a smaller learning rate, or its "
            "logarithm as the parameter"
        )
    fmt = scheme.format
    if zero_point is None or not isinstance(fmt, IntegerFormat) or not zero_point.numel():
        return
    if zero_point.dtype.is_floating_point:
        raise SchemeError(f"zero_point is {zero_point.dtype}; it is the code of 0.0, so round it to int32 first")
    low, high = int(zero_point.min()), int(zero_point.max())
    if not fmt.qmin <= low <= high <= fmt.qmax:
        raise SchemeError(
            f"zero points from {low} to {high} are no codes of {fmt.name}, {fmt.qmin} to {fmt.qmax}; clip them"
        )


def _encode(x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    shape = tuple(x.shape)
    per_element_scale = spread(scale.to(working(x).dtype), shape, scheme.granularity)
    per_element_zero = None if zero_point is None else spread(zero_point, shape, scheme.granularity)
    return scheme.grid.encode(x, per_element_scale, per_element_zero)


def dequantize(q: QTensor | MixedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reconstruction x_hat, computed in float32 (float64 when asked for) and then cast to `dtype`.

    Columns that a `MixedTensor` keeps in floating point are cast alone.
    """
    if not isinstance(q, QTensor):
        return q.dequantize(dtype)
    compute = dtype if dtype == torch.float64 else torch.float32
    scale = spread(q.scale.to(compute), q.shape, q.scheme.granularity)
    zero_point = None if q.zero_point is None else spread(q.zero_point, q.shape, q.scheme.granularity)
    return q.scheme.grid.decode(q.codes, scale, zero_point, compute).to(dtype)


def require_finite(x: Tensor) -> None:
    """Refuse NaN and infinity: no scale could be right for the tile that holds them."""
    # A NaN makes both ends NaN; asking each element takes twelve times as long.
    if x.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(x.detach())):
        return
    first = tuple(int(i) for i in torch.nonzero(~torch.isfinite(x))[0])
    count = int((~torch.isfinite(x)).sum())
    raise DataError(
        f"{count} of {x.numel()} elements are NaN or infinite, the first is {x[first].item()} at {list(first)}; "
        "the file may be damaged or the training diverged: check the original model's outputs first"
    )
