"""How large each channel of a stream of activations is: what SmoothQuant and AWQ ask of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.calibration.sample import rows_of
from halfbin.errors import DataError

COLUMNS = 512  # whose magnitudes are held at once


class ChannelStatistics:
    """Extremes and mean magnitude of every channel.

    Extremes and counts of two observers merge to the bit, in any order. |x| is summed in float32 within a sample and in
    float64 across samples, so the mean does to the rounding of float64 additions; to the bit where one of the two observers
    saw a single sample and comes later, or saw none.

    num_features: channels.
    num_tokens:   tokens seen. While it is 0, all statistics are 0.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self._minimum = torch.full((num_features,), torch.inf, device=device)
        self._maximum = torch.full((num_features,), -torch.inf, device=device)
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Observe one sample: float [..., num_features], finite.

        Raises:
          DataError: another number of features, or NaN, infinity or beyond 2**96, with the channel.
        """
        rows = rows_of(x, self.num_features, at_most=2.0**96)  # 2**32 tokens can be summed
        if not len(rows):
            return
        minimum, maximum = torch.aminmax(rows, dim=0)
        total = torch.cat([part.abs().sum(dim=0) for part in torch.split(rows, COLUMNS, dim=1)])
        self._include(minimum, maximum, total.to(torch.float64), len(rows))

    def merge(self, later: ChannelStatistics) -> None:
        """Add what another observer saw of the samples that came after."""
        if later.num_features != self.num_features:
            raise DataError(f"cannot merge {later.num_features} features into {self.num_features}")
        self._include(later._minimum, later._maximum, later._sum, later.num_tokens)

    def divide(self, scale: Tensor) -> None:
        """Make of this the statistics of x / scale, float [num_features], all > 0."""
        self._minimum = (self._minimum / scale).to(torch.float32)
        self._maximum = (self._maximum / scale).to(torch.float32)
        self._sum = self._sum / scale

    def _include(self, minimum: Tensor, maximum: Tensor, total: Tensor, num_tokens: int) -> None:
        self._minimum = torch.minimum(self._minimum, minimum)
        self._maximum = torch.maximum(self._maximum, maximum)
        self._sum = self._sum + total
        self.num_tokens += num_tokens

    @property
    def minimum(self) -> Tensor:
        """The lowest value of each channel, float32 [num_features]; it may be positive."""
        return self._minimum.clone() if self.num_tokens else torch.zeros_like(self._minimum)

    @property
    def maximum(self) -> Tensor:
        """The highest value of each channel, float32 [num_features]; it may be negative."""
        return self._maximum.clone() if self.num_tokens else torch.zeros_like(self._maximum)

    @property
    def absmax(self) -> Tensor:
        """The largest |x| of each channel, float32 [num_features]; 0 exactly where the channel was always 0."""
        return torch.maximum(-self.minimum, self.maximum)

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean of |x| of each channel, float64 [num_features]."""
        return self._sum / max(self.num_tokens, 1)
