"""The rate that other kernels are held against."""

from __future__ import annotations

import types

import pytest

from halfbin.kernels import streaming
from halfbin.kernels.streaming import read_rate


def test_a_rate_is_the_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(streaming, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert read_rate(num_bytes=2**10, rounds=3) == 2**10 / 2.0


def test_memory_is_really_read() -> None:
    assert 1e6 < read_rate(num_bytes=2**22, rounds=3) < 1e14  # bytes a second: any machine, however busy, and none
