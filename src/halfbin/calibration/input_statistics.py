"""All that methods and transforms ask about one input of a block, in one observer."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.calibration.channel_statistics import ChannelStatistics
from halfbin.calibration.cross_moment import CrossMoment
from halfbin.calibration.second_moment import SecondMoment
from halfbin.errors import DataError

ROWS_PER_CALL = 32


class InputStatistics:
    """Statistics of an input's channels, its second moment, and a few of its rows.

    channels: range and mean magnitude of each channel.
    """

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features
        self.channels = ChannelStatistics(num_features)
        self._moment = SecondMoment(num_features)
        self._moved: CrossMoment | None = None
        self._rows: list[Tensor] = []

    @property
    def num_tokens(self) -> int:
        """Rows seen."""
        return self._moment.num_tokens

    def add(self, x: Tensor, unrounded: Tensor | None = None) -> None:
        """Observe one call's rows.

        Args:
          x: float [..., in_features].
          unrounded: what x would be if nothing had been rounded yet, shaped alike; None: x itself.

        Raises:
          DataError: NaN or infinity.
        """
        rows = x.detach().reshape(-1, self.num_features).to(torch.float32)
        if unrounded is not None:
            self._add_moved(rows, unrounded.detach().reshape(rows.shape).to(torch.float32))
        self._moment.add(rows)
        self.channels.add(rows)
        step = max(1, len(rows) // ROWS_PER_CALL)
        self._rows.append(rows[::step][:ROWS_PER_CALL].clone())

    @property
    def rows(self) -> Tensor:
        """Evenly spaced rows of each call, for what only samples can tell: float32 [some, in_features]."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.num_features)

    @property
    def moment(self) -> SecondMoment:
        """The second moment, as it is summed."""
        return self._moment

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """X^T X, [in_features, in_features]."""
        return self._moment.matrix(dtype)

    def forget(self) -> None:
        """Give the memory of the moments and the rows back; counts and channels stay."""
        self._moment.forget()
        self._moved = None
        self._rows.clear()

    def squares(self) -> Tensor:
        """The sum of x^2 of each feature, float64 [in_features]."""
        return self._moment.diagonal()

    def moved(self) -> Tensor | None:
        """(X_float - X)^T X, float64 [in_features, in_features], not a copy; None where no input is another than in float."""
        return None if self._moved is None else self._moved.matrix()

    def _add_moved(self, rows: Tensor, unrounded: Tensor) -> None:
        if not torch.equal(unrounded, rows):
            self._moved = self._moved or CrossMoment(self.num_features)
            self._moved.add(unrounded - rows, rows)

    def divide(self, scale: Tensor) -> None:
        """Make of these the statistics of x / scale.

        Args:
          scale: float [in_features], all > 0.
        """
        if len(scale) != self.num_features or not bool((scale > 0).all()):
            raise DataError(f"expected a scale of {self.num_features} channels, all above 0, got {len(scale)}")
        wide = scale.to(torch.float64)
        self._moment.divide(wide)
        self.channels.divide(wide)
        if self._moved is not None:
            self._moved.divide(wide)
        self._rows = [(rows / wide).to(torch.float32) for rows in self._rows]
