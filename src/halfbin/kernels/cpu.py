"""What this processor can run, which decides between the compiled forms of a kernel."""

from __future__ import annotations

import functools

import torch

from halfbin.kernels import _native


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets that are usable here, as the operating system allows it, by the names that kernels ask for.

    On x86-64 of pclmul (with SSE4.1), avx2 (with FMA and F16C), avx_vnni, avx512 (F, BW, DQ, VL), avx512_vnni, avx512_vbmi,
    avx512_bf16, amx_int8, amx_bf16; on Arm of neon, neon_crc, neon_dotprod, neon_i8mm. Empty elsewhere: the portable form
    runs everywhere.
    """
    return frozenset(_native.cpu_features())


def streaming_read(memory: torch.Tensor) -> int:
    """Read a contiguous tensor of a multiple of 64 bytes in order, on torch's number of threads; the sum of its 64-bit words.

    The time it takes is the limit for anything that reads as much: a product of few tokens with as many bytes of weights.
    """
    num_bytes = memory.numel() * memory.element_size()
    if num_bytes % 64 or not memory.is_contiguous():
        raise ValueError(f"{num_bytes} bytes are no multiple of 64, or not contiguous")
    return _native.streaming_read(memory.data_ptr(), num_bytes, torch.get_num_threads())
