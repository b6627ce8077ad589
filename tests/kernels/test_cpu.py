"""The instruction sets that kernels are chosen by."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from halfbin.kernels.cpu import features

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {  # ours: what Linux calls the least of it
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512f", "avx512_vnni"},
    "avx512_vbmi": {"avx512f", "avx512vbmi"},
    "avx512_bf16": {"avx512f", "avx512_bf16"},
    "amx_int8": {"amx_tile", "amx_int8"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
}


@pytest.mark.skipif(not CPUINFO.exists() or platform.machine() != "x86_64", reason="reads what Linux says of an x86-64")
@pytest.mark.parametrize("name", FLAGS)
def test_a_feature_is_there_exactly_when_the_system_lists_it(name: str) -> None:
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    assert (name in features()) == (FLAGS[name] <= set(line.split()))
