"""The quantized form of transformers' Conv1D: a linear layer whose weight is stored [in_features, out_features]."""

from __future__ import annotations

from torch import Tensor

from halfbin.nn.linear import QuantLinear


class QuantConv1D(QuantLinear):
    """The `QTensor` holds the transposed weight, [out_features, in_features], so that groups lie along in_features."""

    @property
    def nf(self) -> int:
        """How many outputs, by the name that Conv1D has for it."""
        return self.out_features

    @property
    def nx(self) -> int:
        """How many inputs, by the name that Conv1D has for it."""
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The reconstruction as Conv1D holds it, [in_features, out_features]."""
        return super().weight.T
