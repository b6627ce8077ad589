"""Running statistics of what flows into a layer; who is observed is the caller's business.

Every observer takes one sample at a time with `add(x)`, float [..., num_features], and takes over what another one saw of
later samples with `merge(later)`. Each file says to what degree merging equals observing both streams.
"""

from __future__ import annotations

from halfbin.calibration.activation_histogram import ActivationHistogram
from halfbin.calibration.channel_statistics import ChannelStatistics
from halfbin.calibration.cross_moment import CrossMoment, cross_product
from halfbin.calibration.histogram_ranges import Histogram, range_of
from halfbin.calibration.input_statistics import InputStatistics
from halfbin.calibration.outlier_features import outlier_features
from halfbin.calibration.second_moment import SecondMoment, upper_product
from halfbin.calibration.token_maxima import TokenMaxima

__all__ = [
    "ActivationHistogram",
    "ChannelStatistics",
    "CrossMoment",
    "Histogram",
    "InputStatistics",
    "SecondMoment",
    "TokenMaxima",
    "cross_product",
    "outlier_features",
    "range_of",
    "upper_product",
]
