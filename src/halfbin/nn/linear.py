"""A linear layer with a quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbin.nn.kernels import KERNELS
from halfbin.nn.matmul import CpuFeatures, MatmulKernel, choose
from halfbin.nn.packed_module import PackedModule
from halfbin.nn.reference import Reference
from halfbin.tensor import QTensor

_is_grad_enabled = torch.is_grad_enabled  # looked up once: every product asks


class QuantLinear(PackedModule):
    """y = x @ w_hat.T + bias, in the activation's type; with which arithmetic is its kernel's business.

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
        self.choose(kernels)

    @property
    def multiplied(self) -> tuple[str, Mapping[str, str]]:
        """The kernel, and why those before it would not."""
        return self.kernel.name, self.refusals

    def choose(self, kernels: Sequence[MatmulKernel]) -> None:
        """Multiply by the first of these that does not refuse: `nn.EXACT` for float inputs as they are."""
        self._kernels = tuple(kernels)
        with self._unpacked():
            self.kernel, self.refusals = choose(kernels, self.qtensor, CpuFeatures.detect())

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type."""
        kernel = self.kernel
        try:  # where `self.bias` finds it, without the 0.4 us of two calls of __getattr__
            bias = self._parameters["bias"]
        except KeyError:  # it is parametrised
            bias = self.bias
        if (
            not wants_gradient(x, bias)
            and kernel.declines(x) is None
            and (packed := self._alone or self._prepared()) is not None
        ):
            return kernel.matmul(x, packed, bias)
        return Reference().matmul(x, self.qtensor, bias)

    def _pack(self) -> Any:
        return self.kernel.pack(self.qtensor)

    def _is_packed(self) -> bool:
        return self.kernel.declines(self._cast) is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        with self._unpacked():
            super()._apply(fn, recurse)
            self.choose(self._kernels)  # another device has other kernels
        return self

    def extra_repr(self) -> str:
        """Sizes, bias, scheme and kernel."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, kernel={self.kernel.name}"
        )


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is to flow back through a product: the compiled kernels have none, the reference has."""
    return _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
