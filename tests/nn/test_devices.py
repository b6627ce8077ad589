"""Layers that move choose their kernels anew; what is refused says where the codes are."""

from __future__ import annotations

import pytest
import torch

from halfbin.kernels.triton import machine
from halfbin.nn import QuantInputLinear, QuantLinear
from halfbin.tensor import parse_inputs, parse_scheme, quantize


def layer(inputs: str | None = None) -> QuantLinear:
    q = quantize(torch.randn(70, 300, generator=torch.Generator().manual_seed(0)), parse_scheme("int8-channel"))
    return QuantLinear(q) if inputs is None else QuantInputLinear(q, parse_inputs(inputs).quantizer())


@pytest.mark.skipif(machine.interpreted(), reason="Triton's interpreter takes weights on the CPU")
def test_a_layer_on_the_cpu_says_why_it_has_no_gpu_kernel() -> None:
    assert layer().refusals["triton"] == "its codes are on cpu, and Triton's kernels run on CUDA"
    rounded = layer("int8-token-f16")
    assert isinstance(rounded, QuantInputLinear) and rounded.slow is not None
    assert "stored as f16" in rounded.slow


def test_a_layer_that_moves_chooses_anew() -> None:
    mine = layer()
    before = mine.kernel.name
    assert mine.to("meta").kernel.name == "reference"
    assert "codes are on meta" in mine.refusals["triton"]
    assert mine.to_empty(device="cpu").kernel.name == before


def test_a_layer_with_rounded_inputs_that_moves_chooses_anew() -> None:
    mine = layer("int8-token")
    assert isinstance(mine, QuantInputLinear)
    before = mine.slow
    mine.to("meta")
    assert mine.slow is not None and "codes are on meta" in mine.slow
    mine.to_empty(device="cpu")
    assert mine.slow == before
