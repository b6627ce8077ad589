"""`fake_quantize`: what quantizing does to numbers, with a gradient to train through.

With u = x / scale, the rounded value v = value(code) - zero_point and x_hat = scale * v:

    element lies       inside the range    below it                beyond it
    d x_hat / d x      1                   0                       0
    d x_hat / d scale  v - u               minimum - zero_point    maximum - zero_point
    d x_hat / d zero   0                   -scale                  -scale

minimum and maximum are the format's lowest and highest value, so the table reads the same for integers, floats and
tables. Rounding itself, of x, of a scale to how it is stored and of a zero point to a code, counts as the identity.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from halfbin.numerics.formats import Format, IntegerFormat, working
from halfbin.numerics.ranges import RangeEstimator
from halfbin.tensor.granularity import Granularity, regions, scale_shape, spread
from halfbin.tensor.qtensor import QTensor, dequantize, quantize
from halfbin.tensor.scheme import Scheme


def fake_quantize(
    x: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    estimator: RangeEstimator | None = None,
    lsq_gradient_scale: bool = False,
) -> Tensor:
    """dequantize(quantize(x)) bit for bit, differentiable by `x`, `scale` and `zero_point` (straight through).

    The forward pass is `dequantize(quantize(x, scheme, ...), x.dtype)`: float64 is computed in float64, everything
    narrower in float32, with one rounding to x's dtype at the end. Gradients are computed in the same precision.

    Which elements count as clipped depends on whether the range is learned:

    - constant scale and zero point: those that moved by more than half the gap between the last two values, so that
      clipping and not rounding is what moved them. For integers this is rounding before clipping, as torch does. A
      fitted zero point is rounded and leaves one end of a tile up to half a step short: counting that as clipped would
      freeze the largest elements of nearly all tiles, 3.6 % of normal weights under uint4-g32-asym.
    - one of them requires grad: all beyond the ends of the range, as LSQ clips before it rounds. A learned range must
      feel the half step beyond its ends, or it would shrink where it should grow.

    Both comparisons forgive 2 ulps of float32: value / (value / 7), with a fitted scale, may come out above 7.

    Args:
      x: float16, bfloat16, float32 or float64, any shape that the granularity accepts; must be finite.
      scheme: what to round to.
      scale: positive scales, float, shaped as `QTensor.scale`; fitted to `x` when absent, and then a constant to the
        gradient. One that requires grad is learned: it is rounded to how it is stored, and its gradient is the one
        above summed over its tile.
      zero_point: belongs to `scale`, shaped like it; integers, or floats that are rounded half to even and clipped to
        the codes. The gradient of a float one passes through both, so that one that left the codes can return.
      estimator: chooses the range each scale covers when `scale` is not given; the whole range by default.
      lsq_gradient_scale: multiply the gradient of `scale` by 1 / sqrt(N * Q): N elements in its tile, Q the format's
        highest value. LSQ needs it for a learning rate that suits weights and scales alike.

    Returns:
      x_hat, x's dtype and shape.

    Raises:
      DataError: NaN or infinity in `x`, or a scale that is not positive and finite.
      SchemeError: as `quantize`.

    Source: straight-through: Bengio et al. 2013, https://arxiv.org/abs/1308.3432, section 4, and Jacob et al. 2017,
    https://arxiv.org/abs/1712.05877, section 3. Learned scales: Esser et al. 2019, https://arxiv.org/abs/1902.08153,
    section 2.1, equations 3 and 5, and 2.2 for the gradient's scale. Learned zero points: Bhalgat et al. 2020,
    https://arxiv.org/abs/2004.09576, section 3.1. We depart in two things. LSQ counts the ends themselves as clipped.
    LSQ+ learns a real offset beta; ours is -scale * zero_point, with an integer zero point so that 0.0 stays exact,
    and its gradients follow from theirs by the chain rule.
    """
    x_hat: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        x, scale, zero_point, scheme, estimator, lsq_gradient_scale
    )
    return x_hat


class _StraightThrough(torch.autograd.Function):
    """Keeps `x` and the `QTensor` until the backward pass: one byte an element beside `x` itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        scheme: Scheme,
        estimator: RangeEstimator | None,
        lsq_gradient_scale: bool,
    ) -> Tensor:
        """See `fake_quantize`."""
        codes = None if zero_point is None else _nearest_code(zero_point, scheme)
        q = quantize(x, scheme, scale=scale, zero_point=codes, estimator=estimator)
        ctx.save_for_backward(x, q.codes, q.scale, q.zero_point)
        ctx.scheme, ctx.lsq_gradient_scale = scheme, lsq_gradient_scale
        ctx.dtypes = [None if given is None else given.dtype for given in (scale, zero_point)]
        return dequantize(q, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, scale and zero_point; None for the rest."""
        x, codes, stored, zero = ctx.saved_tensors
        q = QTensor(codes, stored, zero, ctx.scheme)
        granularity = q.scheme.granularity
        for_x, for_scale, for_zero = ctx.needs_input_grad[:3]
        steps = working(x) / _spread(q.scale, q, x)
        inside = _inside(steps, q, learned=for_scale or for_zero)
        grad_scale = grad_zero = None
        if for_scale:
            values = q.scheme.format.decode(q.codes, steps.dtype)
            if q.zero_point is not None:
                values = values - _spread(q.zero_point, q, x)
            slope = values - torch.where(inside, steps, 0.0)
            grad_scale = tile_sums(slope * grad, granularity)
            if ctx.lsq_gradient_scale:
                counts = tile_sums(torch.ones_like(steps), granularity)
                grad_scale = grad_scale / (counts.sqrt() * math.sqrt(q.scheme.format.maximum))
            grad_scale = grad_scale.to(ctx.dtypes[0])
        if for_zero:
            slope = torch.where(inside, 0.0, -_spread(q.scale, q, x))
            grad_zero = tile_sums(slope * grad, granularity).to(ctx.dtypes[1])
        return torch.where(inside, grad, 0.0) if for_x else None, grad_scale, grad_zero, None, None, None


def tile_sums(x: Tensor, granularity: Granularity) -> Tensor:
    """The sum of every tile: float of any shape to [*scale_shape], in x's dtype; the adjoint of `spread`."""
    shape = tuple(x.shape)
    sums = x.new_zeros(scale_shape(shape, granularity))
    for region in regions(shape, granularity):
        sums[region.tiles] = region.rows(x).sum(1).reshape(sums[region.tiles].shape)
    return sums


def _nearest_code(zero_point: Tensor, scheme: Scheme) -> Tensor:
    """A zero point as `QTensor` holds it; integers are left to `quantize` to judge."""
    fmt = scheme.format
    if not zero_point.dtype.is_floating_point or not isinstance(fmt, IntegerFormat):
        return zero_point
    return zero_point.round().clamp(fmt.qmin, fmt.qmax).to(torch.int32)


def _inside(steps: Tensor, q: QTensor, *, learned: bool) -> Tensor:
    """Which elements were not clipped, as `fake_quantize` defines it; `steps` is x / scale."""
    fmt = q.scheme.format
    margin_low, margin_high = (0.0, 0.0) if learned else _half_gaps(fmt)
    low: Tensor | float = fmt.minimum - margin_low
    high: Tensor | float = fmt.maximum + margin_high
    if q.zero_point is not None:
        zero = _spread(q.zero_point, q, steps)
        low, high = low - zero, high - zero
    slack = 2 * torch.finfo(torch.float32).eps * steps.abs()
    return (steps + slack >= low) & (steps - slack <= high)


@functools.cache
def _half_gaps(fmt: Format) -> tuple[float, float]:
    """Half the gap between the two lowest values of a format, and between the two highest."""
    values = fmt.decode(fmt.codes, torch.float64)
    rising = sorted(set(values[values.isfinite()].tolist()))
    return (rising[1] - rising[0]) / 2, (rising[-1] - rising[-2]) / 2


def _spread(params: Tensor, q: QTensor, like: Tensor) -> Tensor:
    """One value per tile to something that broadcasts against `like`, in its working precision."""
    return spread(params.to(working(like[:0] if like.ndim else like).dtype), q.shape, q.scheme.granularity)
