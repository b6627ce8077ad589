from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbin.nn.kernels import KERNELS
from halfbin.nn.matmul import CpuFeatures, choose
from halfbin.nn.reference import Reference
from halfbin.tensor import QTensor, dequantize, parse_scheme, quantize

CPU = CpuFeatures("pdp11", "DEFAULT")
Q = quantize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), parse_scheme("int4-g4"))


@dataclass(frozen=True)
class Picky:
    name: str = "picky"

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        return None if q.scheme.format.name == "int8" else f"no {q.scheme.format.name} on {cpu.machine}"

    def declines(self, x: Tensor) -> str | None:
        return None

    def pack(self, q: QTensor) -> Any:
        return q.codes

    def matmul(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        raise AssertionError("not run here")


def test_the_first_kernel_that_does_not_refuse_is_chosen_with_the_refusals_before_it() -> None:
    assert choose([Picky(), Reference()], Q, CPU) == (Reference(), {"picky": "no int4 on pdp11"})
    eight_bits = quantize(torch.ones(2, 4), parse_scheme("int8"))
    assert choose([Picky(), Reference()], eight_bits, CPU) == (Picky(), {})


def test_when_all_refuse_the_reasons_are_told() -> None:
    with pytest.raises(LookupError, match="no int4 on pdp11"):
        choose([Picky()], Q, CPU)


def test_the_list_ends_with_the_reference() -> None:
    assert KERNELS[-1] == Reference()


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)) for d in (torch.float32, torch.bfloat16, torch.float64)])
def test_the_reference_multiplies_in_the_activations_type(dtype: torch.dtype) -> None:
    x, bias = torch.randn(3, 8, dtype=dtype), torch.randn(6, dtype=dtype)
    kernel = Reference()
    found = kernel.matmul(x, kernel.pack(Q), bias)
    assert found.dtype == dtype
    assert torch.equal(found, torch.nn.functional.linear(x, dequantize(Q, dtype), bias))


def test_this_machine_says_what_it_is() -> None:
    found = CpuFeatures.detect()
    assert found.machine
    assert found.capability
