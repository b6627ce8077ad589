"""A linear layer with a quantized weight that quantizes its inputs too: w8a8, w4a8, fp8, w4a4.

Three ways to the same product. The plain one, which takes everything: fake_quantize(x) @ dequantize(w)^T in x's type. With
integers on both sides, codes are multiplied and summed exactly in INT32 (`int_matmul`), scaled in float32 and rounded to x's
type once. And where a weight's codes stand for floats, FP8 or NF4, a compiled product with fake_quantize(x), in float32.

How far apart the first two are, for K columns and G groups of the weight; u = 2**-24, and v is the unit roundoff of x's type
(u, or 2**-8 for bfloat16): each of the K products of the plain way carries two roundings to x's type, and their sum K - 1 to
float32; the integer way has at most G + 2. Both end with the bias and a rounding to x's type. So they differ by at most

    (2 v + (K + G + 5) u + 2 v) (|x_hat| @ |w_hat|^T + |bias|),  to first order.

The third differs from the first by no more: its inputs are rounded to x's type, its weights not at all, or to bfloat16 where
there are many tokens of it, and it has K + G + 1 roundings of sums (`kernels/float_products.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halfbin.nn.floats import RoundedFloats
from halfbin.nn.gpu import RoundedInputs
from halfbin.nn.integers import ExactIntegers
from halfbin.nn.linear import QuantLinear, wants_gradient
from halfbin.nn.matmul import CpuFeatures
from halfbin.nn.reference import Reference
from halfbin.numerics import IntegerFormat
from halfbin.tensor import InputQuantizer, InputScheme, QTensor, Scheme, accumulator_bound, int_matmul
from halfbin.tensor.int_matmul import INT32_MAX

INTEGERS = "exact-integers"  # what reports call the compiled kernel


class QuantInputLinear(QuantLinear):
    """y = x_hat @ w_hat.T + bias, in the activation's type.

    Buffers of its state_dict beside those of `QuantLinear`: `input_scale` [1], and `input_zero_point` [1], for static inputs.

    Attributes:
      inputs:  what its inputs are rounded to.
      refusal: why codes are not multiplied as integers; None: they are.
      slow:    why they are not multiplied by a compiled kernel; None: they are. The bits of integers are the same.
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    uncast: ClassVar[tuple[str, ...]] = ("scale", "input_scale")

    def __init__(
        self,
        q: QTensor,
        inputs: InputQuantizer,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make one of codes [out_features, in_features] and a float bias [out_features]; neither is copied."""
        super().__init__(q, bias, dtype=dtype, kernels=(Reference(),))
        self.inputs = inputs.inputs
        self.refusal = refuses_integers(self.in_features, q.scheme, self.inputs)
        self.register_buffer("input_scale", inputs.scale)
        self.register_buffer("input_zero_point", inputs.zero_point)
        self._choose_product()

    @property
    def multiplied(self) -> tuple[str, Mapping[str, str]]:
        """The compiled kernel, and why it multiplies no integers; or step by step."""
        if self.slow:
            return "reference", {INTEGERS: self.slow}
        if self.refusal and isinstance(self.product, RoundedFloats):
            return self.product.name, {INTEGERS: self.refusal}
        return INTEGERS, {}

    @property
    def quantizer(self) -> InputQuantizer:
        """What quantizes its inputs."""
        return InputQuantizer(self.inputs, self.input_scale, self.input_zero_point)

    def _choose_product(self) -> None:
        """The compiled product that takes the codes where they are now, if one does."""
        q, cpu = self.qtensor, CpuFeatures.detect()
        on_gpu = RoundedInputs(self.inputs)
        on_cpu = RoundedFloats(self.inputs) if self.refusal else ExactIntegers(self.inputs)
        not_on_gpu, not_on_cpu = on_gpu.refuses(q, cpu), on_cpu.refuses(q, cpu)
        if self.refusal and not_on_cpu:
            not_on_cpu = f"{self.refusal}; {not_on_cpu}"
        self.product = on_cpu if not_on_gpu else on_gpu
        self.slow = f"{not_on_cpu}; {not_on_gpu}" if not_on_gpu and not_on_cpu else None

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type.

        Raises:
          DataError: NaN or infinity in `x`.
        """
        if x.dtype == torch.float64:  # float32 scales would throw away what float64 was asked for
            return Reference().matmul(self.quantizer.fake_quantize(x), self.qtensor, self.bias)
        fast = not self.slow and x.device == self._cast.device and not wants_gradient(x, self.bias)
        packed = self._prepared() if fast else None
        if packed is not None:
            return self.product.matmul(x, packed, self.bias, self.quantizer)
        if self.refusal:
            return Reference().matmul(self.quantizer.fake_quantize(x), self.qtensor, self.bias)
        return finished(int_matmul(self.quantizer.quantize(x), self.qtensor), self.bias, x)

    def prepare(self) -> Any:
        """Bring the weight into the kernel's layout now, and not at the first forward; None where it is not used."""
        return None if self.slow else super().prepare()

    def _pack(self) -> Any:
        return self.product.pack(self.qtensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantInputLinear:
        with self._unpacked():
            super()._apply(fn, recurse)
            self._choose_product()
        return self

    def _is_packed(self) -> bool:
        return not self.slow and self._cast.is_cpu and self.dtype != torch.float64

    def extra_repr(self) -> str:
        """Sizes, bias, scheme, kernel and inputs."""
        product = "in floats" if self.refusal else "as integers"
        return f"{super().extra_repr()}, inputs={self.inputs} multiplied {product}"


def finished(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A float32 product [tokens, out_features] to [..., out_features] in x's type, the bias added before the one rounding."""
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def refuses_integers(columns: int, weights: Scheme, inputs: InputScheme) -> str | None:
    """Why inputs and weights of `columns` columns cannot be multiplied as integers in INT32; None: they can."""
    x, w = inputs.scheme.format, weights.format
    if not isinstance(x, IntegerFormat) or not isinstance(w, IntegerFormat):
        return f"{(w if isinstance(x, IntegerFormat) else x).name} codes are no integers"
    if inputs.outliers is not None:
        return "outlier columns are multiplied in floats: LLMInt8Linear multiplies the rest as integers"
    size = min(columns, weights.granularity.tile((1, columns))[1])
    x_zeros, w_zeros = (None if s.symmetric else (f.qmin, f.qmax) for s, f in ((inputs.scheme, x), (weights, w)))
    if (bound := accumulator_bound(size, x, w, x_zero_points=x_zeros, w_zero_points=w_zeros)) > INT32_MAX:
        return f"sums over {size} columns could reach {bound}, more than INT32 holds"
    return None
