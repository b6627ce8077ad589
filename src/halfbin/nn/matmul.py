"""Which kernel multiplies by a `QTensor`: the first of a list that does not refuse. The reference, last, refuses nothing."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbin.kernels import cpu
from halfbin.tensor import QTensor


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """What a kernel may ask of the processor.

    machine:      the architecture, such as "x86_64" or "arm64".
    capability:   the widest vector instructions that torch found, such as "AVX2", "AVX512" or "DEFAULT".
    instructions: what our own kernels can use, such as "avx512_vnni"; see `kernels.cpu.features`.
    """

    machine: str
    capability: str
    instructions: frozenset[str] = frozenset()

    @classmethod
    def detect(cls) -> CpuFeatures:
        """This machine's."""
        return cls(platform.machine(), torch.backends.cpu.get_cpu_capability(), cpu.features())


class MatmulKernel(Protocol):
    """Multiplies activations by a quantized weight, from a layout of its own that never reaches the disk."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def refuses(self, q: QTensor, cpu: CpuFeatures) -> str | None:
        """Why not, in words; None: it will do it."""
        ...

    def declines(self, x: Tensor) -> str | None:
        """Why it leaves these inputs to the reference, in words; None: it does not."""
        ...

    def pack(self, q: QTensor) -> Any:
        """The weight [out_features, in_features] in this kernel's layout."""
        ...

    def matmul(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias for float x [..., in_features] and bias [out_features]: x.dtype [..., out_features]."""
        ...


def choose(kernels: Sequence[MatmulKernel], q: QTensor, cpu: CpuFeatures) -> tuple[MatmulKernel, dict[str, str]]:
    """The first kernel that does not refuse, with the refusals of those before it, by name.

    Raises:
      LookupError: all refuse; a list that ends with the reference cannot come to that.
    """
    refusals: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.refuses(q, cpu)
        if reason is None:
            return kernel, refusals
        refusals[kernel.name] = reason
    raise LookupError(
        f"no kernel multiplies by {q.scheme} {list(q.shape)}: {refusals}; end the list with the reference"
    )
