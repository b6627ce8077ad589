"""X^T X over a stream of activations: what GPTQ asks of the data.

Within a sample the products are summed in float32, by the machine's matrix product; samples are added in float64, in their
order. So the result depends neither on how samples were batched into calls nor on where a stream was cut between two
observers, as long as a sample stays whole, beyond the rounding of float64 additions.

Only the blocks on and above the diagonal are computed: with 8 blocks a side that is 36 of 64 products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbin.errors import DataError

BLOCKS = 8


class SecondMoment:
    """Sums x x^T over tokens.

    num_features: in_features of the layer.
    num_tokens:   tokens seen.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.num_tokens = 0
        self._sum = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Observe one sample.

        Args:
          x: float [..., num_features], finite.

        Raises:
          DataError: another number of features, or NaN or infinity.
        """
        if x.shape[-1] != self.num_features:
            raise DataError(f"activations have {x.shape[-1]} features, expected {self.num_features}")
        rows = x.reshape(-1, self.num_features).to(torch.float32)
        diagonal = torch.einsum("ij,ij->j", rows, rows)
        if not bool(torch.isfinite(diagonal).all()):
            worst = int(torch.nonzero(~torch.isfinite(diagonal))[0])
            raise DataError(f"activations are NaN, infinite or beyond float32's squares in feature {worst}")
        step = -(-self.num_features // BLOCKS)
        for start in range(0, self.num_features, step):
            block = rows[:, start : start + step]
            self._sum[start : start + step, start:] += block.T @ rows[:, start:]
        self.num_tokens += len(rows)

    def merge(self, later: SecondMoment) -> None:
        """Add what another observer saw of the samples that came after."""
        if later.num_features != self.num_features:
            raise DataError(f"cannot merge {later.num_features} features into {self.num_features}")
        self._sum += later._sum
        self.num_tokens += later.num_tokens

    def divide(self, scale: Tensor) -> None:
        """Make of this the second moment of x / scale, float64 [num_features]."""
        self._sum /= scale[:, None]
        self._sum /= scale

    def matrix(self) -> Tensor:
        """sum x x^T, float64 [num_features, num_features], symmetric to the bit."""
        upper = self._sum.triu()
        return upper + upper.triu(1).T
