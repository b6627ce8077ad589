"""Running statistics of what flows into a layer; who is observed is the caller's business."""

from __future__ import annotations

from halfbin.calibration.input_statistics import InputStatistics
from halfbin.calibration.second_moment import SecondMoment

__all__ = ["InputStatistics", "SecondMoment"]
