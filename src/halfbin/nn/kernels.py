"""The kernels of this build, in the order of preference, and which of them a model uses."""

from __future__ import annotations

from halfbin.nn.floats import FloatCodes
from halfbin.nn.gpu import FloatInputs
from halfbin.nn.integers import IntegerInputs
from halfbin.nn.matmul import MatmulKernel
from halfbin.nn.reference import Reference

EXACT: tuple[MatmulKernel, ...] = (FloatInputs(), FloatCodes(), Reference())
"""Float inputs, as they are. The last is the plain product with dequantized weights, and takes everything."""

KERNELS: tuple[MatmulKernel, ...] = (FloatInputs(), IntegerInputs(), FloatCodes(), Reference())
"""The fast ones first; where integer weights alone are quantized, inputs are rounded to INT8 on the fly."""
