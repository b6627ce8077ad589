"""Why Triton's kernels do not run, in words: with GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from halfbin.kernels.triton import machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, installed: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(machine, "_installed", lambda: installed)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_that_is_new_enough_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch, (8, 0))
    assert machine.refuses(CUDA) is None
    a_gpu(monkeypatch, (8, 9))
    assert machine.refuses_float8(CUDA) is None


def test_older_gpus_and_machines_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch, (8, 6))
    assert machine.refuses_float8(CUDA) == "a GPU has compute capability 8.6, and products of FP8 want 8.9"
    a_gpu(monkeypatch, (7, 5))
    assert machine.refuses(CUDA) == "a GPU has compute capability 7.5, and products of bfloat16 and INT8 want 8.0"
    assert machine.refuses_float8(CUDA) == machine.refuses(CUDA)
    a_gpu(monkeypatch, (9, 0), installed=False)
    assert machine.refuses(CUDA) == "triton is not installed: pip install 'halfbin[gpu]'"
    a_gpu(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.refuses(CUDA) == "torch is built for ROCm, and these kernels were written for CUDA"


def test_the_cpu_is_for_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_installed", lambda: True)
    assert machine.refuses(CPU) == "its codes are on cpu, and Triton's kernels run on CUDA"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert machine.refuses(CPU) is not None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine.refuses(CPU) is None and machine.refuses_float8(CPU) is None


def test_only_the_interpreter_stores_bfloat16_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.stored_as(torch.bfloat16) == torch.bfloat16
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine.stored_as(torch.bfloat16) == torch.float32
    assert machine.stored_as(torch.float16) == torch.float16


def test_kernels_are_launched_where_x_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Here:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            told.append(self.x)

        def __exit__(self, *_: object) -> None:
            told.append("left")

    def launch(x: torch.Tensor, times: int) -> torch.Tensor:
        told.append("launched")
        return x * times

    monkeypatch.setattr(torch.cuda, "device_of", Here)
    x = torch.ones(1)
    assert machine.on_the_device_of_x(launch)(x, times=3).item() == 3
    assert told[0] is x and told[1:] == ["launched", "left"]
