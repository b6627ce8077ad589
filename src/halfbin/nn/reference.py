"""The plain kernel: dequantize the whole weight, then multiply in the activation's type. It refuses nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from halfbin.nn.matmul import CpuFeatures
from halfbin.tensor import QTensor, dequantize


@dataclass(frozen=True, slots=True)
class Reference:
    """Needs memory for one dequantized weight during each call; its layout is the `QTensor` itself."""

    name: str = "reference"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """Never."""
        return None

    def declines(self, x: Tensor) -> str | None:
        """Never."""
        return None

    def pack(self, q: QTensor) -> QTensor:
        """Nothing to do."""
        return q

    def matmul(self, x: Tensor, packed: QTensor, bias: Tensor | None) -> Tensor:
        """Float [..., in_features] to x.dtype [..., out_features]."""
        return functional.linear(x, dequantize(packed, x.dtype), bias)
