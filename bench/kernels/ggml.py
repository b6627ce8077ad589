"""A product by llama.cpp: one node of a ggml graph, called through the libraries that llama-cpp-python brings along.

Weights are quantized by ggml itself and placed where its CPU backend repacks them for the processor's instructions, as
llama.cpp does with a model's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

F32, Q4_0, Q4_K = 0, 2, 12  # of enum ggml_type
NODES = 8


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The functions that a product needs, with their types."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "lib"
        libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            found: Any = next(f for library in libraries if (f := getattr(library, name, None)) is not None)
            found.restype, found.argtypes = result, arguments
            return found  # type: ignore[no-any-return]

        self.init = function("ggml_init", c_void_p, InitParams)
        self.free = function("ggml_free", None, c_void_p)
        self.tensor_2d = function("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
        self.mul_mat = function("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
        self.graph = function("ggml_new_graph", c_void_p, c_void_p)
        self.expand = function("ggml_build_forward_expand", None, c_void_p, c_void_p)
        self.overhead = function("ggml_tensor_overhead", c_size_t)
        self.graph_overhead = function("ggml_graph_overhead", c_size_t)
        self.row_size = function("ggml_row_size", c_size_t, c_int, c_int64)
        self.quantize = function(
            "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
        )
        self.place = function("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
        self.free_buffer = function("ggml_backend_buffer_free", None, c_void_p)
        self.set = function("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
        self.get = function("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
        self.compute = function("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
        buffer_name = function("ggml_backend_buft_name", c_char_p, c_void_p)
        registry = function("ggml_backend_reg_by_name", c_void_p, c_char_p)(b"CPU")
        self.device = function("ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t)(registry, 0)
        self.start = function("ggml_backend_dev_init", c_void_p, c_void_p, c_char_p)
        self.plain = function("ggml_backend_dev_buffer_type", c_void_p, c_void_p)(self.device)
        address = function("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
        extras = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address(registry, b"ggml_backend_dev_get_extra_bufts"))
        self.set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)(address(registry, b"ggml_backend_set_n_threads"))
        found, place = extras(self.device), 0
        while found[place] and buffer_name(found[place]) != b"CPU_REPACK":  # a null pointer ends them
            place += 1
        self.repacked = found[place] or self.plain

    def context(self) -> c_void_p:
        """Room for the description of a few tensors; their numbers lie elsewhere."""
        made: c_void_p = self.init(InitParams(NODES * self.overhead() + self.graph_overhead(), None, True))
        return made


@functools.cache
def ggml() -> Ggml:
    return Ggml()


class Product:
    """A weight [n, k] in one of ggml's types, and graphs for the numbers of tokens that it has met."""

    def __init__(self, weight: Tensor, kind: int, threads: int) -> None:
        g, (n, k) = ggml(), weight.shape
        self.n, self.k = n, k
        self.backend = g.start(g.device, None)
        g.set_threads(self.backend, threads)
        source = np.ascontiguousarray(weight.float().numpy())
        codes = np.empty(n * g.row_size(kind, k), np.uint8)
        g.quantize(kind, source.ctypes.data, codes.ctypes.data, 0, n, k, None)
        context = g.context()
        self.weight = g.tensor_2d(context, kind, k, n)
        if not g.place(context, g.repacked):
            raise MemoryError(f"ggml cannot place {n} x {k}")
        g.set(self.weight, codes.ctypes.data, 0, codes.nbytes)
        self.graphs: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        g, m = ggml(), len(x)
        if m not in self.graphs:
            context = g.context()
            inputs = g.tensor_2d(context, F32, self.k, m)
            outputs = g.mul_mat(context, self.weight, inputs)
            graph = g.graph(context)
            g.expand(graph, outputs)
            g.place(context, g.plain)
            self.graphs[m] = inputs, outputs, graph
        inputs, outputs, graph = self.graphs[m]
        x = x.contiguous()
        g.set(inputs, x.data_ptr(), 0, x.numel() * 4)
        if g.compute(self.backend, graph):
            raise RuntimeError("ggml did not compute the graph")
        y = torch.empty(m, self.n)
        g.get(outputs, y.data_ptr(), 0, y.numel() * 4)
        return y


def make(kind: int) -> Callable[[Tensor, Tensor, int], Product]:
    """For `peers.py`: codes int8 [n, k] and float32 scales [n, groups] as floats, quantized again by ggml."""

    def product(codes: Tensor, scale: Tensor, threads: int) -> Product:
        groups = codes.unflatten(1, (scale.shape[1], -1)).float()
        return Product((groups * scale[:, :, None]).flatten(1), kind, threads)

    return product
