"""What this processor can run, which decides between the compiled forms of a kernel."""

from __future__ import annotations

import functools

from halfbin.kernels import _native


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets that are usable here, as the operating system allows it, by the names that kernels ask for.

    On x86-64 of avx2 (with FMA and F16C), avx_vnni, avx512 (F, BW, DQ, VL), avx512_vnni, avx512_vbmi, avx512_bf16, amx_int8,
    amx_bf16; on Arm of neon, neon_dotprod, neon_i8mm. Empty elsewhere: the portable form runs everywhere.
    """
    return frozenset(_native.cpu_features())
