"""A linear layer with a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbin.nn.matmul import CpuFeatures, MatmulKernel, choose
from halfbin.nn.module import QuantModule
from halfbin.nn.reference import KERNELS
from halfbin.tensor import QTensor


class QuantLinear(QuantModule):
    """y = x @ w_hat.T + bias, in the activation's type.

    Attributes:
      kernel: what multiplies.
      refusals: why the kernels before it would not, by their names.
    """

    bias: nn.Parameter | None

    def __init__(self, q: QTensor, bias: nn.Parameter | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        """Make one of codes [out_features, in_features] and a float bias [out_features]; neither is copied."""
        super().__init__(q, dtype)
        self.out_features, self.in_features = q.shape
        self.register_parameter("bias", bias)
        self.kernel: MatmulKernel
        self.kernel, self.refusals = choose(KERNELS, q, CpuFeatures.detect())

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type."""
        # The reference packs nothing. A kernel that does will have to keep its layout until the buffers change.
        return self.kernel.matmul(x, self.kernel.pack(self.qtensor), self.bias)

    def extra_repr(self) -> str:
        """Sizes, bias, scheme and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, kernel={self.kernel.name}"
        )
