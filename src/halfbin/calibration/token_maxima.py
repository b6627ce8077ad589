"""The largest |x| of every token: what a scale per token would be, and what one for all tokens must cover."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbin.calibration.sample import rows_of
from halfbin.errors import DataError


class TokenMaxima:
    """Keeps one float32 number for each token, in their order; merging two observers is exact.

    num_features: channels.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self._parts = [torch.zeros(0, device=device)]

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return sum(len(part) for part in self._parts)

    def add(self, x: Tensor) -> None:
        """Observe one sample: float [..., num_features], finite.

        Raises:
          DataError: another number of features, or NaN or infinity, with the channel.
        """
        rows = rows_of(x, self.num_features)
        if rows.numel():
            self._parts.append(torch.linalg.vector_norm(rows, torch.inf, dim=1))

    def merge(self, later: TokenMaxima) -> None:
        """Add what another observer saw of the samples that came after."""
        if later.num_features != self.num_features:
            raise DataError(f"cannot merge {later.num_features} features into {self.num_features}")
        self._parts.extend(later._parts)

    @property
    def values(self) -> Tensor:
        """The largest |x| of each token, float32 [num_tokens], in the order in which they were seen."""
        return torch.cat(self._parts)

    def quantile(self, share: float) -> float:
        """The smallest maximum that at least `share` of all tokens do not exceed (nearest rank); 0.5 is the median.

        Raises:
          DataError: no token was seen, or `share` is not within [0, 1].
        """
        if not 0.0 <= share <= 1.0 or not self.num_tokens:
            raise DataError(f"no quantile {share} of {self.num_tokens} tokens: observe some, and ask for 0 to 1")
        # 12 digits are kept, as in `numerics.ranges.Percentile`: 0.999 * 1000 must be rank 999.
        rank = max(math.ceil(round(share * self.num_tokens, 12)), 1)
        return float(self.values.kthvalue(rank).values)
