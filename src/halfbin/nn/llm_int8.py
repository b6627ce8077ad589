"""LLM.int8(): a linear layer whose inputs are INT8 but for the few columns that hold outliers.

    y = s_w . (s_x . (x_int8 @ w_int8^T))         columns without an outlier: one scale a token, one a weight row, INT32 sums
      + x[:, O] @ w_hat[:, O]^T  + bias           columns O in which any |x| of the batch is `threshold` or more, in float32

A column that is left out is a column of zeros to the first product, which changes none of its sums and no longer sets scales.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 3: vector-wise quantization (3.1) and the
mixed-precision decomposition (3.2, equation 8). We depart in two things. The paper keeps 16-bit weights beside the INT8 ones
for the outlier columns; we keep nothing beside the codes and dequantize those columns, as bitsandbytes does, so that an
outlier meets a weight that is rounded to a step of its row. And the paper's 16-bit product and sum are float32 here, rounded
to x's type once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from halfbin.errors import SchemeError
from halfbin.nn.module import QuantModule
from halfbin.nn.quant_inputs import finished, refuses_integers
from halfbin.tensor import (
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


class LLMInt8Linear(QuantModule):
    """y = x @ w_hat.T + bias, in the activation's type; see the top of this file.

    Attributes:
      threshold: |x| from which on a column is an outlier; infinity: none ever is, which is plain w8a8 per token; 0: all are.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        q: QTensor,
        bias: nn.Parameter | None = None,
        *,
        threshold: float = THRESHOLD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make one of integer codes [out_features, in_features], one scale a row, and a float bias; neither is copied.

        Raises:
          SchemeError: other codes, other granularity, more columns than INT32 sums can hold, or a negative threshold.
        """
        super().__init__(q, dtype)
        self.out_features, self.in_features = q.shape
        if q.scheme.granularity not in (PerChannel(0), PerToken()):
            raise SchemeError(f"LLM.int8() has one scale for each weight row, got {q.scheme}: use int8-channel")
        if reason := refuses_integers(self.in_features, q.scheme, INT8_TOKEN):
            raise SchemeError(f"LLM.int8() multiplies integers, and {reason}: use int8-channel weights")
        if math.isnan(threshold) or threshold < 0:
            raise SchemeError(f"threshold={threshold} must be 0 or more; 6.0 is the usual one")
        self.threshold = threshold
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in_features] to [..., out_features] of the same type; all that comes before the last axis is one batch.

        Raises:
          DataError: NaN or infinity in `x`.
        """
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        require_finite(rows)
        kept = outlier_columns(rows, self.threshold)
        y = int_matmul(quantize(torch.where(kept, 0.0, rows), INT8_TOKEN.scheme), self.qtensor)
        if bool(kept.any()):
            columns = torch.nonzero(kept)[:, 0]
            y = y + rows[:, columns].to(torch.float32) @ dequantize(_columns(self.qtensor, columns)).T
        return finished(y, self.bias, x)

    def extra_repr(self) -> str:
        """Sizes, bias, scheme and threshold."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, threshold={self.threshold:g}"
        )


def _columns(q: QTensor, columns: Tensor) -> QTensor:
    """Some columns (integers [k], k > 0) of a weight with one scale a row."""
    return QTensor(q.codes[:, columns], q.scale, q.zero_point, q.scheme)
