"""The kernels of this build, in the order of preference, and which of them a model uses."""

from __future__ import annotations

from halfbin.nn.gpu import FloatInputs
from halfbin.nn.integers import IntegerInputs
from halfbin.nn.matmul import MatmulKernel
from halfbin.nn.reference import Reference

EXACT: tuple[MatmulKernel, ...] = (FloatInputs(), Reference())
"""Float inputs, as they are, times dequantized weights."""

KERNELS: tuple[MatmulKernel, ...] = (FloatInputs(), IntegerInputs(), Reference())
"""The fast ones first; where weights alone are quantized, they round inputs to INT8 on the fly."""
