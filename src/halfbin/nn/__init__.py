"""Modules that hold a `QTensor`, the kernels that multiply by one, and swapping them into a model."""

from __future__ import annotations

from halfbin.nn.conv import Geometry, QuantConv
from halfbin.nn.conv1d_transposed import QuantConv1D
from halfbin.nn.convert import Swap, quantize_module
from halfbin.nn.embedding import QuantEmbedding
from halfbin.nn.experts import ExpertStack, QuantExperts
from halfbin.nn.folding import fold_inputs
from halfbin.nn.kernels import EXACT, KERNELS
from halfbin.nn.kv_cache import quantize_kv_cache
from halfbin.nn.linear import QuantLinear
from halfbin.nn.llm_int8 import LLMInt8Linear
from halfbin.nn.matmul import CpuFeatures, MatmulKernel, choose
from halfbin.nn.module import QuantModule
from halfbin.nn.norms import RmsNorm, fuse_norms
from halfbin.nn.quant_inputs import QuantInputLinear
from halfbin.nn.reference import Reference
from halfbin.nn.simulate import llm_int8, quantize_inputs
from halfbin.nn.simulation import Simulation

__all__ = [
    "EXACT",
    "KERNELS",
    "CpuFeatures",
    "ExpertStack",
    "Geometry",
    "LLMInt8Linear",
    "MatmulKernel",
    "QuantConv",
    "QuantConv1D",
    "QuantEmbedding",
    "QuantExperts",
    "QuantInputLinear",
    "QuantLinear",
    "QuantModule",
    "Reference",
    "RmsNorm",
    "Simulation",
    "Swap",
    "choose",
    "fold_inputs",
    "fuse_norms",
    "llm_int8",
    "quantize_inputs",
    "quantize_kv_cache",
    "quantize_module",
]
