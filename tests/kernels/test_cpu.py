"""The instruction sets that kernels are chosen by."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from halfbin.kernels.cpu import features, streaming_read

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {  # ours: what Linux calls the least of it
    "pclmul": {"pclmulqdq", "sse4_1"},
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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_streaming_read_sees_every_word_once(threads: int) -> None:
    words = torch.arange(8 * 101, dtype=torch.int64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert streaming_read(words) == int(words.sum())
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="8 bytes are no multiple of 64"):
        streaming_read(words[:1])
