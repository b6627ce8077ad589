"""Round to nearest: each weight becomes the closest value its tile's scale can express. No data, no search."""

from __future__ import annotations

from torch import Tensor

from halfbin.numerics.ranges import RangeEstimator
from halfbin.tensor.qtensor import QTensor, quantize
from halfbin.tensor.scheme import Scheme


def rtn(weight: Tensor, scheme: Scheme, *, estimator: RangeEstimator | None = None) -> QTensor:
    """Round every weight to the nearest value of the scheme, ties to the even code.

    Minimises each weight's own error under the scale of its tile; it looks at no other weight and at no input.

    Args:
      weight: float, any shape that the scheme's granularity accepts; finite.
      scheme: what to round to.
      estimator: chooses the range each scale covers; the whole range by default, so that nothing clips.

    Raises:
      DataError: NaN or infinity in `weight`.
      SchemeError: the scheme does not fit the shape.
    """
    return quantize(weight, scheme, estimator=estimator)
