"""All that methods and transforms ask about one input of a block, in one observer."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.calibration.second_moment import SecondMoment
from halfbin.errors import DataError

ROWS_PER_CALL = 32


class InputStatistics:
    """Statistics of an input's channels, and a few of its rows.

    num_tokens: rows seen.
    absmax:     float32 [in_features], the largest |x|.
    mean_abs:   float64 [in_features], the mean |x|.
    rows:       float32 [some, in_features], evenly spaced rows of each call, for what only samples can tell.
    """

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self.absmax = torch.zeros(num_features)
        self._sum_abs = torch.zeros(num_features, dtype=torch.float64)
        self._moment = SecondMoment(num_features)
        self._rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Observe one call's rows, float [..., in_features].

        Raises:
          DataError: NaN or infinity.
        """
        rows = x.detach().reshape(-1, self.num_features).to(torch.float32)
        self._moment.add(rows)
        magnitude = rows.abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self._sum_abs += magnitude.sum(0)
        step = max(1, len(rows) // ROWS_PER_CALL)
        self._rows.append(rows[::step][:ROWS_PER_CALL].clone())
        self.num_tokens += len(rows)

    @property
    def mean_abs(self) -> Tensor:
        """The mean |x| of each channel, float64 [in_features]."""
        return self._sum_abs / max(self.num_tokens, 1)

    @property
    def rows(self) -> Tensor:
        """Some rows, float32 [some, in_features]."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.num_features)

    def matrix(self) -> Tensor:
        """X^T X, float64 [in_features, in_features]."""
        return self._moment.matrix()

    def divide(self, scale: Tensor) -> None:
        """Make of these the statistics of x / scale.

        Args:
          scale: float [in_features], all > 0.
        """
        if len(scale) != self.num_features or not bool((scale > 0).all()):
            raise DataError(
                f"a scale of {len(scale)} channels, all above 0, was expected for {self.num_features} features"
            )
        wide = scale.to(torch.float64)
        self._moment.divide(wide)
        self.absmax = (self.absmax / wide).to(torch.float32)
        self._sum_abs = self._sum_abs / wide
        self._rows = [(rows / wide).to(torch.float32) for rows in self._rows]
