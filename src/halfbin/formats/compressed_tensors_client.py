"""What transformers with compressed-tensors 0.20 does to inputs, step for step: to check a written directory bit for bit.

It fake-quantizes the input of each nn.Linear before the float product, in the input's own type. Where that differs from
`InputQuantizer`, which computes in float32 and is what integer hardware does:

- the dynamic scale of symmetric integers is max|x| / 127.5 for int8 (half the number of steps), ours max|x| / 127; the largest
  element of a token is then clipped by half a step. For fp8 and for asymmetric integers both are the same;
- scale, division and product are rounded to the input's type, so in bfloat16 a code is often one off;
- "token" means one scale for each index of the first two axes: the tokens of [batch, tokens, features], but *everything* of
  [tokens, features] is one token, and all heads of [batch, tokens, heads, features];
- a static scale is cast to the model's type when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbin.numerics import IntegerFormat
from halfbin.tensor import InputQuantizer, PerToken


@dataclass(frozen=True, slots=True, eq=False)
class ClientQuantizer(InputQuantizer):
    """An `InputQuantizer` that rounds as that client does; for int2 to int8 and fp8_e4m3."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Float [*, in_features], the same shape and type."""
        if not x.numel():
            return x
        fmt = self.inputs.scheme.format
        scale, zero_point = self._client_params(x)
        steps = x / scale
        if zero_point is not None:
            steps = steps + zero_point.to(x.dtype)
        steps = steps.clamp(fmt.minimum, fmt.maximum)
        rounded = steps.round() if isinstance(fmt, IntegerFormat) else steps.to(torch.float8_e4m3fn).to(x.dtype)
        if zero_point is not None:
            rounded = rounded - zero_point.to(x.dtype)
        return rounded * scale

    def _client_params(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.scale is not None:
            return self.scale.to(x.dtype), self.zero_point
        fmt = self.inputs.scheme.format
        axes = tuple(range(2, x.ndim)) if isinstance(self.inputs.scheme.granularity, PerToken) else ()
        axes = axes or tuple(range(x.ndim))
        low, high = x.amin(axes, keepdim=True).clamp(max=0.0), x.amax(axes, keepdim=True).clamp(min=0.0)
        steps = fmt.maximum - fmt.minimum
        if self.inputs.scheme.symmetric:
            return _positive(torch.maximum(-low, high) / (steps / 2)), None
        scale = (high - low) / steps
        zero_point = (fmt.minimum - low / scale).clamp(fmt.minimum, fmt.maximum).nan_to_num(0.0).round()
        return _positive(scale), zero_point.to(torch.int8)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
