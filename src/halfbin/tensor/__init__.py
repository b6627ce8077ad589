"""Schemes, granularities, and tensors of codes."""

from __future__ import annotations

from halfbin.tensor.fake_quantize import fake_quantize
from halfbin.tensor.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    scale_shape,
    spread,
)
from halfbin.tensor.inputs import InputQuantizer, InputScheme, outlier_columns, parse_inputs
from halfbin.tensor.int_matmul import accumulator_bound, int_matmul
from halfbin.tensor.mixed import ColumnSpec, FloatColumns, MixedTensor, split, take_columns
from halfbin.tensor.packed import PackedTensor, quantize_packed
from halfbin.tensor.qtensor import QTensor, dequantize, fit, quantize, require_finite
from halfbin.tensor.scheme import Scheme, parse_scheme

__all__ = [
    "ColumnSpec",
    "FloatColumns",
    "Granularity",
    "InputQuantizer",
    "InputScheme",
    "MixedTensor",
    "PackedTensor",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "Scheme",
    "accumulator_bound",
    "dequantize",
    "fake_quantize",
    "fit",
    "int_matmul",
    "outlier_columns",
    "parse_inputs",
    "parse_scheme",
    "quantize",
    "quantize_packed",
    "require_finite",
    "scale_shape",
    "split",
    "spread",
    "take_columns",
]
