"""LLM.int8(): a linear layer whose inputs are INT8 but for the few columns that hold outliers.

    y = s_w . (s_x . (x_int8 @ w_int8^T))       columns without an outlier: one scale a token, one a weight row, INT32 sums
      + x[:, C] @ w[:, C]^T                     columns C that the weight keeps in 16 bits, in float32
      + x[:, O] @ w_hat[:, O]^T  + bias         other columns O in which any |x| of the batch is `threshold` or more, in float32

A column that is left out is a column of zeros to the first product, which changes none of its sums and no longer sets scales.
C is known beforehand: the input features that were outliers on calibration data. What such a feature is multiplied by
is often tiny, for its size is made up for in the weight; a row's step rounds it away. O is found as inputs come, as in the
paper; of those columns only the codes are there, and they are dequantized, as bitsandbytes does with all.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 3: vector-wise quantization (3.1) and the
mixed-precision decomposition (3.2, equation 8). We depart in two things. The paper keeps a 16-bit weight beside the INT8 one
whole, to find any column there; we keep the columns C alone, and the INT8 rows do without them, so that their scales are
finer. And the paper's 16-bit product and sum are float32 here, rounded to x's type once.

Two ways to the same sum: torch's, step by step, and one call of the compiled kernels (`kernels.products.mixed_linear`). They
agree to the bit in the first line above. With c columns in floating point they add c float32 products to it in different
orders: at most 2 c + 3 roundings of 2**-24 each of |first line| + |x[:, C and O]| @ |w[:, C and O]|^T + |bias|, and one each of
x's type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from halfbin.errors import SchemeError
from halfbin.kernels import products
from halfbin.nn.integers import ExactIntegers, PackedIntegers
from halfbin.nn.kept import Kept
from halfbin.nn.linear import wants_gradient
from halfbin.nn.matmul import CpuFeatures
from halfbin.nn.packed_module import PackedModule
from halfbin.nn.packed_weight import readable
from halfbin.nn.quant_inputs import finished, refuses_integers
from halfbin.tensor import (
    FloatColumns,
    MixedTensor,
    PerChannel,
    PerToken,
    QTensor,
    dequantize,
    int_matmul,
    outlier_columns,
    parse_inputs,
    quantize,
    require_finite,
)

THRESHOLD = 6.0  # the paper's, section 4.1: with it, degradation vanishes at all sizes it measured
INT8_TOKEN = parse_inputs("int8-token")
INTEGERS = ExactIntegers(INT8_TOKEN)


class LLMInt8Linear(PackedModule):
    """y = x @ w_hat.T + bias, in the activation's type; see the top of this file.

    Attributes:
      threshold: |x| from which on a column is an outlier; infinity: none ever is, which is plain w8a8 per token; 0: all are.
      slow:      why the compiled kernels do not multiply; None: they do.

    Buffers of its state_dict beside `codes` and `scale`: `column_ids` and `column_values`, where columns are kept in 16 bits.
    """

    bias: nn.Parameter | None
    column_ids: Tensor | None
    column_values: Tensor | None
    uncast: ClassVar[tuple[str, ...]] = ("scale", "column_values")

    def __init__(
        self,
        q: QTensor,
        bias: nn.Parameter | None = None,
        *,
        columns: FloatColumns | None = None,
        threshold: float = THRESHOLD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make one of integer codes [out_features, in_features], one scale a row, and a float bias; nothing is copied.

        Args:
          q: the codes; those of `columns` are not looked at.
          bias: float [out_features].
          columns: of the weight, in floating point: their inputs always go through the float product. None: every column is
            INT8, and outliers' are dequantized.
          threshold: see above.
          dtype: the type that the weight is read as.

        Raises:
          SchemeError: other codes, other granularity, more columns than INT32 sums can hold, a negative threshold, or columns
            that are none of this weight.
        """
        super().__init__(q, dtype)
        self.out_features, self.in_features = q.shape
        if q.scheme.granularity not in (PerChannel(0), PerToken()):
            raise SchemeError(f"LLM.int8() has one scale for each weight row, got {q.scheme}: use int8-channel")
        if reason := refuses_integers(self.in_features, q.scheme, INT8_TOKEN):
            raise SchemeError(f"LLM.int8() multiplies integers, and {reason}: use int8-channel weights")
        if math.isnan(threshold) or threshold < 0:
            raise SchemeError(f"threshold={threshold} must be 0 or more; 6.0 is the usual one")
        if columns is not None:
            MixedTensor(q, columns)  # refuses columns of another weight
            if columns.axis != 1:
                raise SchemeError("columns are those of a weight [in_features, out_features]; here it is [out, in]")
        self.threshold = threshold
        self.slow = INTEGERS.refuses(q, CpuFeatures.detect())
        self._float_columns = Kept()
        self.register_parameter("bias", bias)
        self.register_buffer("column_ids", None if columns is None else columns.ids)
        self.register_buffer("column_values", None if columns is None else columns.values)

    @property
    def multiplied(self) -> tuple[str, Mapping[str, str]]:
        """The compiled call, or torch step by step."""
        return ("reference", {"LLM.int8()": self.slow}) if self.slow else ("LLM.int8()", {})

    @property
    def columns(self) -> FloatColumns | None:
        """The columns in floating point, sharing this module's memory."""
        if self.column_ids is None or self.column_values is None:
            return None
        return FloatColumns(self.column_ids, self.column_values)

    @property
    def weight(self) -> Tensor:
        """The reconstruction [out_features, in_features], made anew at each access."""
        columns = self.columns
        return dequantize(self.qtensor if columns is None else MixedTensor(self.qtensor, columns), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type; all that comes before the last axis is one batch.

        Raises:
          DataError: NaN or infinity in `x`.
        """
        fast = self._is_packed() and x.is_cpu and x.dtype != torch.float64 and not wants_gradient(x, self.bias)
        if fast and products.is_plain(x):
            given = x if x.dtype in products.INPUT_TYPES else x.to(torch.float32)
            packed: PackedIntegers = self.prepare()
            bias, columns = readable(self.bias), self._prepared_columns()
            y = products.mixed_linear(given, packed.memory, bias, self.out_features, self.threshold, columns)
            return y.to(x.dtype)
        return self._plainly(x)

    def _plainly(self, x: Tensor) -> Tensor:
        """`forward` step by step: what the compiled way is held against, and where it is not used."""
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        require_finite(rows)
        outliers, always = outlier_columns(rows, self.threshold), self._always(rows)
        y = int_matmul(quantize(torch.where(outliers | always, 0.0, rows), INT8_TOKEN.scheme), self.qtensor)
        if self.column_ids is not None and self.column_values is not None:
            y = y + _product(rows, self.column_ids.to(torch.int64), self.column_values)
        if bool((outliers & ~always).any()):
            columns = torch.nonzero(outliers & ~always)[:, 0]
            y = y + _product(rows, columns, dequantize(_columns(self.qtensor, columns)))
        return finished(y, self.bias, x)

    def _pack(self) -> PackedIntegers:
        return INTEGERS.pack(self.qtensor)

    def _is_packed(self) -> bool:
        return not self.slow and self._cast.is_cpu and self.dtype != torch.float64

    def _prepared_columns(self) -> tuple[Tensor, Tensor] | None:
        """The columns in floating point as the kernels read them: one after the other."""
        ids, values = self.column_ids, self.column_values
        if ids is None or values is None:
            return None
        found: tuple[Tensor, Tensor] = self._float_columns.of(
            (ids, values), lambda: (ids.contiguous(), values.T.contiguous())
        )
        return found

    def extra_repr(self) -> str:
        """Sizes, bias, scheme, threshold and the number of columns in floating point."""
        kept = "" if self.column_ids is None else f", columns={len(self.column_ids)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, threshold={self.threshold:g}{kept}"
        )

    def _always(self, rows: Tensor) -> Tensor:
        """Which columns are in floating point: bool [in_features]."""
        inside = torch.zeros(self.in_features, dtype=torch.bool, device=rows.device)
        if self.column_ids is not None:
            inside[self.column_ids.to(torch.int64)] = True
        return inside


def _product(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Of some columns (int64 [k]) of the inputs, in float32: [tokens, in] and [out, k] to [tokens, out]."""
    return rows[:, columns].to(torch.float32) @ weight.to(torch.float32).T


def _columns(q: QTensor, columns: Tensor) -> QTensor:
    """Some columns (integers [k], k > 0) of a weight with one scale a row."""
    return QTensor(q.codes[:, columns], q.scale, q.zero_point, q.scheme)
