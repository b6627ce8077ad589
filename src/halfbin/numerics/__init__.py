"""Number formats, rounding, scales, range estimators and error measures, on plain tensors."""

from __future__ import annotations

from halfbin.numerics.affine import Grid
from halfbin.numerics.formats import FORMATS, FloatFormat, Format, IntegerFormat, TableFormat
from halfbin.numerics.ranges import ESTIMATORS, Entropy, MeanSquaredError, MinMax, Percentile, RangeEstimator
from halfbin.numerics.scales import ScaleFormat

__all__ = [
    "ESTIMATORS",
    "FORMATS",
    "Entropy",
    "FloatFormat",
    "Format",
    "Grid",
    "IntegerFormat",
    "MeanSquaredError",
    "MinMax",
    "Percentile",
    "RangeEstimator",
    "ScaleFormat",
    "TableFormat",
]
