"""Number formats, rounding, scales, range estimators and error measures, on plain tensors."""

from __future__ import annotations

from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat
from halfbin.numerics.ranges import MinMax, RangeEstimator
from halfbin.numerics.scales import ScaleFormat

__all__ = [
    "FORMATS",
    "FloatFormat",
    "Format",
    "Grid",
    "IntegerFormat",
    "MinMax",
    "RangeEstimator",
    "ScaleFormat",
    "TableFormat",
]
