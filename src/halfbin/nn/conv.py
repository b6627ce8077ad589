"""A convolution of one, two or three dimensions with a quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfbin.nn.module import QuantModule
from halfbin.tensor import QTensor, dequantize

FloatConv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a convolution slides.

    shape:   of the float weight, [out_channels, in_channels / groups, *kernel].
    padding: "same", "valid", or how many values each dimension gets at both of its ends.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: FloatConv) -> Geometry:
        """That of a float convolution."""
        shape = tuple(conv.weight.shape)
        return cls(shape, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)

    def edges(self) -> list[int]:
        """Padding for each end of each dimension, the last dimension first, as `functional.pad` wants it."""
        if isinstance(self.padding, str):
            total = [
                d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.shape[2:], strict=True)
            ]
            ends = [(n // 2, n - n // 2) for n in total]
        else:
            ends = [(n, n) for n in self.padding]
        return [n for pair in reversed(ends) for n in pair]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Float [batch, in_channels, *size], or without the batch, by a weight of `shape`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self.edges(), mode=self.padding_mode), (0,) * len(self.stride)
        convolution = _CONVOLUTIONS[len(self.stride)]
        return convolution(x, weight, bias, self.stride, padding, self.dilation, self.groups)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class QuantConv(QuantModule):
    """A convolution in the activation's type.

    The `QTensor` holds the weight as the matrix that meets each patch: [out_channels, in_channels / groups * prod(kernel)].
    So a group is along everything that one output is summed from, not along a kernel's last side, which is 3 long.
    """

    bias: nn.Parameter | None

    def __init__(
        self, q: QTensor, geometry: Geometry, bias: nn.Parameter | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Make one of codes [out_channels, inputs of one output] and a float bias [out_channels]; neither is copied."""
        super().__init__(q, dtype)
        self.geometry = geometry
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The reconstruction, [out_channels, in_channels / groups, *kernel]."""
        return super().weight.reshape(self.geometry.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, in_channels, *size] to [batch, out_channels, *size] of the same type."""
        weight = dequantize(self.qtensor, x.dtype).reshape(self.geometry.shape)
        return self.geometry.convolve(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Shape, geometry where it is not the default, bias and scheme."""
        g = self.geometry
        one, zero = (1,) * len(g.stride), (0,) * len(g.stride)
        defaults = {"stride": one, "padding": zero, "dilation": one, "groups": 1, "padding_mode": "zeros"}
        shown = [f"{key}={getattr(g, key)}" for key, usual in defaults.items() if getattr(g, key) != usual]
        return ", ".join([str(list(g.shape)), *shown, f"bias={self.bias is not None}", str(self.scheme)])
