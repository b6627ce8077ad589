"""Other libraries' products with 4- and 8-bit weights, each as a function of float32 inputs; those that are installed.

Every `make` takes codes int8 [n, k] from -8 to 7 (or -128 to 127), float32 scales [n, k / 128] (or [n, 1]) and the number of
threads, copies what it needs, and gives a call from float32 x [m, k] to its result.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ggml
import numpy as np
import torch
from torch import Tensor

from halfbin.kernels import float_products, products
from halfbin.numerics.formats import NF4

Call = Callable[[Tensor], Any]
GROUP = 128
NF4_GROUP = 64


@dataclass(frozen=True)
class Peer:
    name: str
    bits: int
    bits_per_weight: float
    make: Callable[[Tensor, Tensor, int], Call]
    module: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def halfbin_int4(codes: Tensor, scale: Tensor, threads: int) -> Call:
    packed = products.pack(codes, scale.half(), None, bits=4, least=-8, group_size=GROUP)
    return lambda x: products.linear(x, packed, None, len(codes), products.InputGrid())


def halfbin_int4_avx2(codes: Tensor, scale: Tensor, threads: int) -> Call:
    call = halfbin_int4(codes, scale, threads)

    def on_avx2(x: Tensor) -> Any:
        with products.forced("avx2", threads):
            return call(x)

    return on_avx2


def halfbin_int8(codes: Tensor, scale: Tensor, threads: int) -> Call:
    packed = products.pack(codes, scale, None, bits=8, least=-128, group_size=codes.shape[1])
    return lambda x: products.linear(x, packed, None, len(codes), products.InputGrid(by_group=False))


def halfbin_nf4(codes: Tensor, scale: Tensor) -> Tensor:
    indices, scale = (codes + 8).to(torch.uint8), scale.half().repeat_interleave(GROUP // NF4_GROUP, 1)
    return float_products.pack(indices, scale, float_products.Kind.TABLE, group_size=NF4_GROUP, table=NF4.table)


def halfbin_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    patterns = codes.float().to(torch.float8_e4m3fn).view(torch.uint8)
    return float_products.pack(patterns, scale, float_products.Kind.E4M3, group_size=codes.shape[1])


def halfbin_floats(
    pack: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, instruction_set: str | None = None
) -> Callable[[Tensor, Tensor, int], Call]:
    def make(codes: Tensor, scale: Tensor, threads: int) -> Call:
        packed, n = pack(codes, scale), len(codes)
        if instruction_set is None:
            return lambda x: float_products.linear(x.to(dtype), packed, None, n)
        return lambda x: float_products.compiled(x.to(dtype), packed, None, n, instruction_set=instruction_set)

    return make


def bitsandbytes_nf4(codes: Tensor, scale: Tensor, threads: int) -> Call:
    """Its layer, blocks of 64; the library's own loops, which need AVX-512 BF16, and not what it would download."""
    import bitsandbytes

    n, k = codes.shape
    layer = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    values = torch.tensor(NF4.table)[(codes + 8).long()] * scale.repeat_interleave(GROUP, 1)
    layer.weight = bitsandbytes.nn.Params4bit(
        values.bfloat16(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    layer = layer.to("cpu").eval()
    return lambda x: layer(x.bfloat16())


def nibbles(codes: Tensor) -> Any:
    """Two unsigned codes a byte, the first in the low half: uint8 [n, k / 2]."""
    u = (codes + 8).numpy().astype(np.uint8)
    return u[:, 0::2] | u[:, 1::2] << 4


def onnxruntime_int4(codes: Tensor, scale: Tensor, threads: int) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = codes.shape
    packed = nibbles(codes).reshape(n, k // GROUP, GROUP // 2)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scale.numpy().reshape(-1), "scales")],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def openvino_int4(codes: Tensor, scale: Tensor, threads: int) -> Call:
    import openvino as ov
    from openvino import opset13 as ops

    n, k = codes.shape
    packed = np.ascontiguousarray(nibbles(codes) ^ 0x88)  # signed again
    weight = ops.constant(ov.Tensor(packed, [n, k // GROUP, GROUP], ov.Type.i4))
    groups = ops.multiply(
        ops.convert(weight, ov.Type.f16), ops.constant(scale.half().numpy().reshape(n, k // GROUP, 1))
    )
    rows = ops.convert(ops.reshape(groups, ops.constant(np.array([n, k], np.int64)), False), ov.Type.f32)
    x = ops.parameter([-1, k], ov.Type.f32)
    model = ov.Model([ops.matmul(x, rows, False, True)], [x])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)


def torch_int4pack(codes: Tensor, scale: Tensor, threads: int) -> Call:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 2)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], 2).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales)


def torch_int8(engine: str) -> Callable[[Tensor, Tensor, int], Call]:
    def make(codes: Tensor, scale: Tensor, threads: int) -> Call:
        torch.backends.quantized.engine = engine
        linear = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False)
        linear.weight.data = codes * scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.nn.Sequential(linear)
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    return make


def torch_bfloat16(codes: Tensor, scale: Tensor, threads: int) -> Call:
    weight = (codes * scale).bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), weight)


PEERS = [
    Peer("halfbin int4 g128", 4, 4.125, halfbin_int4),
    Peer("halfbin int4 g128, AVX2", 4, 4.125, halfbin_int4_avx2),
    Peer("onnxruntime int4 b128", 4, 4.25, onnxruntime_int4, "onnxruntime"),
    Peer("OpenVINO int4 g128", 4, 4.125, openvino_int4, "openvino"),
    Peer("llama.cpp Q4_0", 4, 4.5, ggml.make(ggml.Q4_0), "llama_cpp"),
    Peer("llama.cpp Q4_K", 4, 4.5, ggml.make(ggml.Q4_K), "llama_cpp"),
    Peer("torch int4pack g128", 4, 4.25, torch_int4pack),
    Peer("halfbin nf4 g64", 4, 4.25, halfbin_floats(halfbin_nf4, torch.float32)),
    Peer("halfbin nf4 g64, bf16", 4, 4.25, halfbin_floats(halfbin_nf4, torch.bfloat16)),
    Peer("halfbin nf4 g64, AVX2", 4, 4.25, halfbin_floats(halfbin_nf4, torch.float32, "avx2")),
    Peer("bitsandbytes nf4 g64, bf16", 4, 4.5, bitsandbytes_nf4, "bitsandbytes"),
    Peer("halfbin fp8", 8, 8.0, halfbin_floats(halfbin_fp8, torch.float32)),
    Peer("halfbin fp8, bf16", 8, 8.0, halfbin_floats(halfbin_fp8, torch.bfloat16)),
    Peer("halfbin fp8, AVX2", 8, 8.0, halfbin_floats(halfbin_fp8, torch.float32, "avx2")),
    Peer("halfbin int8", 8, 8.0, halfbin_int8),
    Peer("torch int8, oneDNN", 8, 8.0, torch_int8("onednn")),
    Peer("torch int8, x86", 8, 8.0, torch_int8("x86")),
    Peer("torch bf16", 8, 16.0, torch_bfloat16),
]
