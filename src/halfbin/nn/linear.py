"""A linear layer with a quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.nn.kept import Kept
from halfbin.nn.kernels import KERNELS
from halfbin.nn.matmul import CpuFeatures, MatmulKernel, choose
from halfbin.nn.module import QuantModule
from halfbin.nn.reference import Reference
from halfbin.tensor import QTensor


class QuantLinear(QuantModule):
    """y = x @ w_hat.T + bias, in the activation's type; with which arithmetic is its kernel's business.

    What the kernel made of the weight is kept, beside the weight, until the weight changes: another 0.5 bytes for each code of
    up to 4 bits, 1 for wider ones, and the scales. It is made by the first forward, or by `prepare`.

    Attributes:
      kernel: what multiplies.
      refusals: why the kernels before it would not, by their names.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        q: QTensor,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        kernels: Sequence[MatmulKernel] = KERNELS,
    ) -> None:
        """Make one of codes [out_features, in_features] and a float bias [out_features]; neither is copied."""
        super().__init__(q, dtype)
        self.out_features, self.in_features = q.shape
        self.register_parameter("bias", bias)
        self.kernel: MatmulKernel
        self._packed = Kept()
        self.choose(kernels)

    def choose(self, kernels: Sequence[MatmulKernel]) -> None:
        """Multiply by the first of these that does not refuse: `nn.EXACT` for float inputs as they are."""
        self._kernels = tuple(kernels)
        self.kernel, self.refusals = choose(kernels, self.qtensor, CpuFeatures.detect())
        self._packed.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type."""
        kernel, bias = self.kernel, self.bias
        if not wants_gradient(x, bias) and kernel.declines(x) is None and (packed := self._prepared()) is not None:
            return kernel.matmul(x, packed, bias)
        return Reference().matmul(x, self.qtensor, bias)

    def prepare(self) -> Any:
        """Bring the weight into the kernel's layout now, and not at the first forward. Needed before compiling or exporting."""
        held = self._buffers
        return self._packed.of((held["codes"], held["scale"], held["zero_point"]), self._pack)

    def _pack(self) -> Any:
        return self.kernel.pack(self.qtensor)

    def _prepared(self) -> Any:
        """What `prepare` made; None where a compiler looks on, which sees no memory, and nothing was made before."""
        return self._packed.value if torch.compiler.is_compiling() else self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        self.choose(self._kernels)  # another device has other kernels; and the packed weight's memory goes now
        return self

    def extra_repr(self) -> str:
        """Sizes, bias, scheme and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, kernel={self.kernel.name}"
        )


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is to flow back through a product: the compiled kernels have none, the reference has."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
